"""The dictionaries of one ring: rows and copies of storage/dictionary.py's table, and the training."""

from __future__ import annotations

import errno
import logging
import weakref
from typing import TYPE_CHECKING

from storage.block import LEVEL, column_bytes, decode_block
from storage.dictionary import (
    MAX_TRAINING_BYTES,
    MIN_TRAINING_BYTES,
    MIN_TRAINING_SAMPLES,
    TRAINING_RUN,
    Dictionary,
    read_dictionary_file,
    train,
    write_dictionary_file,
)
from storage.errors import CorruptBlockError, CorruptRingError, RingFullError
from storage.memory import give_back
from storage.ring_writer import U32
from storage.rows import unseal

if TYPE_CHECKING:
    from storage.ring import Ring

__all__ = ["RingDictionaries"]

log = logging.getLogger("edgewater.ring")


class RingDictionaries:
    """Finds dictionaries by their ids, mends what is damaged, and trains the first one.

    Args:
        ring: Whose rows they are.
    """

    def __init__(self, ring: Ring) -> None:
        # Weakly: a ring that is dropped without a close must let go of its environment at once.
        self._ring: Ring = weakref.proxy(ring)
        self._known: dict[int, Dictionary] = {}
        self._next_training = MIN_TRAINING_SAMPLES

    @property
    def newest(self) -> Dictionary | None:
        """The one that new blocks are packed with."""
        return next(reversed(self._known.values()), None)

    def find(self, number: int) -> Dictionary | None:
        """A dictionary by its id; one that came after this ring was opened is looked up."""
        if number not in self._known:
            data = self.rows().get(number)
            found = Dictionary(data) if data is not None else read_dictionary_file(self._ring.folder, number)
            if found is None or found.id != number:
                return None
            self._known[number] = found
        return self._known[number]

    def rows(self) -> dict[int, bytes | None]:
        """Id -> dictionary as its row holds it, None where the row is damaged."""
        rows: dict[int, bytes | None] = {}
        with self._ring.reading() as txn:
            cursor = txn.cursor()
            found = cursor.set_range(b"Z")
            while found and cursor.key()[:1] == b"Z" and len(cursor.key()) == U32.size:
                try:
                    data: bytes | None = unseal(bytes(cursor.key()), cursor.value())
                except CorruptRingError:
                    data = None
                rows[U32.unpack(cursor.key())[1]] = data
                found = cursor.next()
        return rows

    def mend(self) -> None:
        """Read them all, and put back the row by the copy or the copy by the row."""
        lost = []
        for number, data in self.rows().items():
            copy = read_dictionary_file(self._ring.folder, number)
            found = Dictionary(data) if data is not None else copy
            if found is None or found.id != number:
                lost.append(number)
                log.error("dictionary %08x is lost: the blocks that need it cannot be read", number)
                continue
            self._known[number] = found
            if copy is None:
                self._write_copy(found)
            if data is None:
                log.warning("dictionary %08x was damaged and is put back from its copy", number)
                with self._ring.writing() as writer:
                    writer.rows.put(U32.pack(b"Z", number), found.data)
        if lost:
            with self._ring.writing() as writer:
                for number in lost:
                    writer.rows.delete(U32.pack(b"Z", number))

    def train_once(self) -> None:
        """Train the install's dictionary on the blocks that are there, once there are enough."""
        held = self._ring.state.next_seq - self._ring.state.tail_seq
        if self._known or held < self._next_training:
            return
        self._next_training = 2 * held
        self._train()
        give_back()

    def _train(self) -> None:
        columns = self._columns()
        dictionary = train(columns, LEVEL) if sum(map(len, columns)) >= MIN_TRAINING_BYTES else None
        # 1. The copy beside the ring is durable.  Crash: a stray file that no block names.
        # 2. The row.                              From here blocks may name it.
        if dictionary is None or not self._write_copy(dictionary):
            return  # the ring goes on without it on a full disk, and tries again later
        try:
            with self._ring.writing() as writer:
                writer.rows.put(U32.pack(b"Z", dictionary.id), dictionary.data)
        except RingFullError:
            return  # the commit before it stands; tried again when the ring holds twice as much
        self._known[dictionary.id] = dictionary
        log.info("trained the dictionary %08x on %d bytes", dictionary.id, sum(map(len, columns)))

    def _columns(self) -> list[bytes]:
        columns: list[bytes] = []
        for _, block in self._ring.copied_blocks():
            try:
                samples = decode_block(block, self.find).present()
            except CorruptBlockError:
                continue
            runs = range(0, len(samples), TRAINING_RUN)
            columns += (column_bytes(samples[i : i + TRAINING_RUN]) for i in runs)
            if sum(map(len, columns)) >= MAX_TRAINING_BYTES:
                break
        return columns

    def _write_copy(self, dictionary: Dictionary) -> bool:
        """Write the copy beside the ring. Returns: whether there was room; the ring itself needs none."""
        try:
            write_dictionary_file(self._ring.folder, dictionary)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise self._ring.failed("the dictionary's copy cannot be written", error) from error
            log.warning("no room for a copy of the dictionary beside %s", self._ring.folder)
            return False
        return True
