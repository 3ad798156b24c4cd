"""The configuration: strict, every fault at once with its place, references resolved, secrets never shown."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from pipeline import config
from pipeline.config import Config, ConfigError, Duration, Fault, Secret, Size

SOURCE = '[[sources]]\nname = "cmms"\nkind = "stdin"\n'
HTTP = SOURCE.replace("stdin", "http") + 'http.listen = "127.0.0.1:8086"\n'
MQTT = SOURCE.replace("stdin", "mqtt") + 'mqtt = { url = "mqtt://x", client_id = "c", topics = { a = {} } }\n'


def _write(folder: Path, text: str) -> Path:
    path = folder / "edgewater.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _faults(folder: Path, text: str, *overrides: str) -> list[Fault]:
    with pytest.raises(ConfigError) as caught:
        config.load(_write(folder, text), overrides)
    return caught.value.faults


def test_only_the_sources_have_no_default(tmp_path: Path) -> None:
    """A file that names one source is a whole configuration."""
    loaded = config.load(_write(tmp_path, SOURCE))
    assert msgspec.structs.replace(loaded, sources=()) == Config()
    assert loaded.trigger.min_samples == 300
    assert loaded.gate.max_anchor_delta_bits == 0.08


def test_a_file_without_a_source_is_a_fault_only_for_verbs_that_ingest(tmp_path: Path) -> None:
    """`status` and `score` need nothing to read."""
    assert [fault.dotted for fault in _faults(tmp_path, "")] == ["sources"]
    assert config.load(_write(tmp_path, ""), require_sources=False) == Config()
    assert config.load(None, ["gateway.name=box-1"], require_sources=False).gateway.name == "box-1"


def test_every_key_that_the_design_names_is_taken(tmp_path: Path) -> None:
    """These names are a promise to users."""
    loaded = config.load(
        _write(
            tmp_path,
            """
            data_dir = "data"
            gateway.name = "site-3"
            model.path = "models/a"
            ring = { max_bytes = "64MiB", max_age = "30d", flush_ms = 500 }
            dedup.horizon_events = 1000
            ingest.processes = 1
            [trigger]
            mode = "threshold"
            min_samples = 64
            min_tokens = 4096
            max_age = "1h"
            max_due = 2
            cooldown = "10m"
            [update]
            profile = "full"
            rank = 8
            learning_rate = 5e-4
            max_steps = 50
            seed = 7
            [gate]
            max_anchor_delta_bits = 0.1
            min_gain = 0.02
            [serve]
            listen = "127.0.0.1:9000"
            [[sources]]
            name = "pump-1"
            kind = "files"
            path = "in/*.jsonl.zst"
            dedup = "delivery"
            deadband = { pressure = 0.05 }
            max_silence = "1m"
            [sources.render]
            tags = ["pressure"]
            units.pressure = "bar"
            digits = 4
            """,
        )
    )
    assert loaded.data_dir == tmp_path / "data"
    assert loaded.model.path == str(tmp_path / "models/a")
    assert (loaded.ring.max_bytes, loaded.ring.max_age) == (64 * 2**20, 30 * 86400)
    assert (loaded.trigger.max_age, loaded.trigger.cooldown) == (3600, 600)
    source = loaded.sources[0]
    assert source.path == str(tmp_path / "in/*.jsonl.zst")
    assert (source.dedup, source.deadband, source.max_silence) == ("delivery", {"pressure": 0.05}, 60)
    assert source.render == config.Render(tags=("pressure",), units={"pressure": "bar"}, digits=4)


def test_all_faults_come_at_once_each_with_line_path_and_advice(tmp_path: Path) -> None:
    """Nobody should mend a configuration one error at a time."""
    text = f"""\
[ring]
max_bytes = 5
flush_ms = "fast"
max_agee = "1d"
[trigger]
min_samples = 3
row_tokens = 9
[gateway]
name = "Upper Case"
[updates]
rank = 1
{SOURCE}dedup = "contents"
"""
    faults = _faults(tmp_path, text)
    assert [(fault.line, fault.dotted) for fault in faults] == [
        (2, "ring.max_bytes"),
        (3, "ring.flush_ms"),
        (4, "ring.max_agee"),
        (6, "trigger.min_samples"),
        (7, "trigger.row_tokens"),
        (9, "gateway.name"),
        (10, "updates"),
        (15, "sources[0].dedup"),
    ]
    assert faults[0].message == 'expected a size in quotes with its unit, as in "256MiB", got 5'
    assert faults[1].message == 'expected a whole number from 10 to 60000, got "fast"'
    assert faults[2].suggestion == 'did you mean "max_age"?'
    assert faults[3].message == "expected a whole number from 32 to 1000000, got 3"
    assert faults[4].suggestion == 'did you mean "update.row_tokens"? it stands in another table'
    assert faults[6].suggestion == 'did you mean "update"?'
    assert faults[7].suggestion == 'did you mean "content"?'
    path = tmp_path / "edgewater.toml"
    assert str(faults[2]) == f'{path}:4: ring.max_agee: unknown key (did you mean "max_age"?)'


@pytest.mark.parametrize(
    ("text", "dotted", "line"),
    [
        (SOURCE + SOURCE.replace("stdin", 'files"\npath = "x'), "sources[1].name", 5),
        (SOURCE + "burst = 5\n", "sources[0].burst", 4),
        (HTTP + HTTP.replace("cmms", "b"), "sources[1].http.listen", 8),
        (HTTP.replace("8086", "9464"), "sources[0].http.listen", 4),
        (MQTT + MQTT.replace("cmms", "b"), "sources[1].mqtt.client_id", 8),
        (SOURCE + SOURCE.replace("cmms", "b"), "sources[1].kind", 6),
        (SOURCE + 'path = "x"\n', "sources[0].path", 4),
        (SOURCE.replace("stdin", "files"), "sources[0].path", 1),
        (SOURCE.replace("stdin", "kafka"), "sources[0].kind", 3),
        (SOURCE.replace("cmms", "../x"), "sources[0].name", 2),
        (SOURCE.replace('"cmms"', '"cmms\\n"'), "sources[0].name", 2),
        ('[[sources]]\nkind = "stdin"\n', "sources[0].name", 1),
        ('[sources]\nname = "a"\n', "sources", 1),
        (SOURCE + "deadband = -1\n", "sources[0].deadband", 4),
        (SOURCE + "deadband = { a = nan }\n", "sources[0].deadband.a", 4),
        (SOURCE + 'render.template = "p {p:.2f}"\n', "sources[0].render.template", 4),
        (SOURCE + 'render.template = "p {p"\n', "sources[0].render.template", 4),
        (SOURCE + 'render.template = "p"\n', "sources[0].render.template", 4),
        (SOURCE + '[sources.render]\ntemplate = "{p}"\ntags = ["p"]\n', "sources[0].render.tags", 6),
        (SOURCE + "[[redact]]\n", "redact[0]", 4),
        (SOURCE + "[[redact]]\npreset = 'email'\npattern = 'x'\n", "redact[0]", 4),
        (SOURCE + "[[redact]]\npreset = 'emial'\n[[redact]]\npattern = 'x'\n", "redact[0].preset", 5),
        (SOURCE + "[[redact]]\npattern = '('\n", "redact[0].pattern", 5),
        (SOURCE + "[[redact]]\npattern = 'x'\nreplacement = '\\1'\n", "redact[0].pattern", 5),
        (SOURCE + '[health]\nlisten = "0.0.0.0:9464"\n', "health.listen", 5),
        (SOURCE + '[health]\nlisten = "127.0.0.1"\n', "health.listen", 5),
        (SOURCE + '[serve]\nlisten = "192.168.0.1:80"\n', "serve.listen", 5),
        (SOURCE + "shard = 2\n", "sources[0].shard", 4),
        (SOURCE + "[ingest]\nprocesses = 2\n[health]\nlisten = '[::1]:65535'\n", "health.listen", 7),
        (SOURCE + '[ring]\nmax_bytes = "1MiB"\n', "ring.max_bytes", 5),
        (SOURCE + "[trigger]\nmin_tokens = 100000000\n", "ring.max_bytes", None),
        (SOURCE + "[trigger]\nmin_tokens = 1024\n[update]\nrow_tokens = 2048\n", "trigger.min_tokens", 5),
        (SOURCE + "[update]\nlearning_rate = inf\n", "update.learning_rate", 5),
        (SOURCE + "[update]\nseed = true\n", "update.seed", 5),
        ("ring = 1\n" + SOURCE, "ring", 1),
        ('data_dir = ""\n' + SOURCE, "data_dir", 1),
    ],
)
def test_what_does_not_fit_is_one_fault_at_its_line(
    tmp_path: Path, text: str, dotted: str, line: int | None
) -> None:
    """A fault names the key that has to change, and does not drag others along."""
    assert [(fault.dotted, fault.line) for fault in _faults(tmp_path, text)] == [(dotted, line)]


def test_every_fault_says_what_to_do(tmp_path: Path) -> None:
    """A message without a way out is half a message."""
    for fault in _faults(
        tmp_path, '[ring]\nx = 1\nmax_bytes = "1MiB"\n[health]\nlisten = "a"\n' + SOURCE + SOURCE
    ):
        assert fault.suggestion or "expected" in fault.message, fault


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("[ring\n", 1, "not TOML"),
        ("\n[gateway]\nname = site\n", 3, 'put text in quotes: "site"'),
        ("a = 1\na = 2\n", 2, "not TOML"),
        ("a = '''\n\n", 3, "not TOML"),
    ],
)
def test_a_file_that_is_not_toml_is_shown_where(tmp_path: Path, text: str, line: int, word: str) -> None:
    """The first syntax error ends the check, with its line and the usual slip."""
    faults = _faults(tmp_path, text)
    assert [fault.line for fault in faults] == [line]
    assert word in str(faults[0])


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    """Missing, a folder, not UTF-8, far too large: each is one fault of the whole file."""
    with pytest.raises(ConfigError, match=r"no such file.*edgewater init"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"# one\nname = '\xff'\n")
    with pytest.raises(ConfigError, match=r"bad.toml:2: not UTF-8"):
        config.load(bad)
    bad.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        config.load(bad)


def test_windows_line_ends_do_not_shift_lines(tmp_path: Path) -> None:
    """A file edited elsewhere is read alike."""
    path = tmp_path / "edgewater.toml"
    path.write_bytes(b"# x\r\n[ring]\r\nflush = 1\r\n" + SOURCE.encode())
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert [fault.line for fault in caught.value.faults] == [3]


def test_overrides_pass_the_same_checks(tmp_path: Path) -> None:
    """--set is the file by other means: TOML values, plain words as text, sources by name or number."""
    path = _write(tmp_path, SOURCE + '[[sources]]\nname = "pump.1"\nkind = "files"\npath = "x"\n')
    loaded = config.load(
        path,
        [
            "trigger.max_age=5m",
            "update.rank=8",
            "sources[0].dedup=none",
            "sources.pump.1.deadband=0.5",
            "data_dir=d",
        ],
    )
    assert loaded.trigger.max_age == 300
    assert loaded.update.rank == 8
    assert [source.dedup for source in loaded.sources] == ["none", None]
    assert loaded.sources[1].deadband == 0.5
    assert loaded.data_dir == tmp_path / "d"

    faults = _faults(
        tmp_path,
        SOURCE,
        "update.rank=0",
        "trigger.min_sample=40",
        "nonsense",
        "sources[4].dedup=none",
        "data_dir.x=1",
    )
    assert {fault.path for fault in faults} == {"--set"}
    keys = sorted(fault.dotted for fault in faults)
    assert keys == ["", "", "data_dir", "trigger.min_sample", "update.rank"]


def test_an_override_mends_what_the_file_has_wrong(tmp_path: Path) -> None:
    """The value that counts is the one that is checked."""
    loaded = config.load(_write(tmp_path, SOURCE + "[update]\nrank = 0\n"), ["update.rank=4"])
    assert loaded.update.rank == 4


def test_references_are_resolved_from_environment_files_and_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the three has its place; $${ stays a plain ${; a final newline is no part of a file's value."""
    (tmp_path / "creds").mkdir()
    (tmp_path / "creds" / "word").write_text("from-cred\n")
    (tmp_path / "name.txt").write_text("from-file\r\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "creds"))
    monkeypatch.setenv("SITE", "from-env")
    text = """
        gateway.name = "${file:name.txt}"
        model.path = "/m/${SITE}/$${x}"
        [[redact]]
        pattern = "${cred:word}"
        """
    loaded = config.load(_write(tmp_path, text + SOURCE))
    assert loaded.gateway.name == "from-file"
    assert loaded.model.path == "/m/from-env/${x}"
    assert loaded.redact[0].pattern == "from-cred"


@pytest.mark.parametrize(
    "reference",
    [
        "${NOT_SET_ANYWHERE}",
        "${file:none.txt}",
        "${cred:none}",
        "${cred:../../etc/passwd}",
        "${env:X}",
        "${}",
    ],
)
def test_an_unknown_reference_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    """An empty password is worse than none; and no name leads out of the credentials."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    faults = _faults(tmp_path, f'gateway.name = "{reference}"\n' + SOURCE)
    assert [(fault.dotted, fault.line) for fault in faults] == [("gateway.name", 1)]
    assert reference in faults[0].message
    assert faults[0].suggestion


def test_secrets_are_masked_wherever_they_could_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`show`, its JSON, repr and fault messages give the reference; the program gets the value."""
    (tmp_path / "word").write_text("hunter2")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    monkeypatch.setenv("PLAIN", "visible")
    text = """
        [[redact]]
        pattern = "${cred:word}"
        replacement = "${MY_TOKEN} ${PLAIN}"
        [[redact]]
        pattern = "${file:word}"
        """
    loaded = config.load(_write(tmp_path, text + SOURCE))
    assert loaded.redact[0].pattern == "hunter2"
    assert isinstance(loaded.redact[0].pattern, Secret)
    assert loaded.redact[0].compiled()[0].sub("x", "my hunter2") == "my x"
    for shown in (
        config.show(loaded),
        config.show(loaded, as_json=True),
        repr(loaded),
        config.digest(loaded),
    ):
        assert "hunter2" not in shown
    assert json.loads(config.show(loaded, as_json=True))["redact"][1]["pattern"] == "${file:word}"
    bad = _faults(tmp_path, 'gateway.name = "X ${cred:word}"\n[ring]\nmax_bytes = "${MY_TOKEN}"\n' + SOURCE)
    assert [fault.dotted for fault in bad] == ["gateway.name", "ring.max_bytes"]
    assert "hunter2" not in "\n".join(map(str, bad))


def test_what_is_shown_loads_to_the_same_configuration(tmp_path: Path) -> None:
    """`config show > edgewater.toml` is a configuration, with odd characters in it too."""
    text = (
        'data_dir = "a \\"b\\" é $${x}"\n[ring]\nmax_age = "90m"\n'
        + SOURCE
        + 'render.units = { "a b" = "°C" }\nrender.tags = ["a b"]\n[[redact]]\npattern = \'\\d\\x7f\'\n'
    )
    loaded = config.load(_write(tmp_path, text))
    again = config.load(_write(tmp_path, config.show(loaded)))
    assert again == loaded
    assert config.digest(again) == config.digest(loaded)


def test_settings_print_their_units() -> None:
    """Effective values read as the file writes them."""
    shown = json.loads(config.show(Config(), as_json=True))
    assert shown["ring"]["max_bytes"] == "256MiB"
    assert isinstance(Config().ring.max_bytes, Size)
    assert isinstance(Config().trigger.cooldown, Duration)


@pytest.mark.parametrize(
    ("kind", "dedup"),
    [("reading", "delivery"), ("text", "content"), ("exchange", "content"), ("feedback", "delivery")],
)
def test_an_unnamed_source_gets_the_defaults_of_its_kind_of_event(kind: str, dedup: str) -> None:
    """As DESIGN.md says, with three significant digits for readings."""
    source = config.source_defaults("new-one", kind)
    assert (source.name, source.dedup, source.render.digits) == ("new-one", dedup, 3)


def test_recipe_and_gate_limits_carry_every_setting(tmp_path: Path) -> None:
    """What the user sets is what the trainer's child gets; the defaults are the recipe's own."""
    from adapters.recipe import GateLimits, Recipe

    assert config.recipe(Config()) == Recipe()
    assert config.gate_limits(Config()) == GateLimits()
    loaded = config.load(
        _write(
            tmp_path,
            SOURCE
            + '[update]\nprofile = "tiny"\nrank = 4\n'
            + "learning_rate = 0.002\nmax_steps = 5\nmax_tokens = 2048\n"
            + "row_tokens = 128\n[gate]\nmin_gain = 0.5\n"
            + "max_anchor_delta_bits = 0.2\nmax_retention_loss = 0.1\n"
            + "max_recited = 0\n",
        )
    )
    recipe, gate = config.recipe(loaded), config.gate_limits(loaded)
    assert (recipe.profile, recipe.rank, recipe.alpha, recipe.learning_rate) == ("tiny", 4, 8, 0.002)
    assert (recipe.max_steps, recipe.max_tokens, recipe.row_tokens) == (5, 2048, 128)
    assert (gate.min_gain, gate.max_anchor_delta_bits) == (0.5, 0.2)
    assert (gate.max_retention_loss, gate.max_recited) == (0.1, 0)


@pytest.mark.parametrize(
    ("preset", "text", "expected"),
    [
        ("email", "ask jo.doe+x@plant.example.com now", "ask <email> now"),
        ("email", "at 5 @ noon", "at 5 @ noon"),
        ("ipv4", "from 10.0.0.17:502 and 1.2.3.4.", "from <ipv4>:502 and <ipv4>."),
        ("ipv4", "firmware 1.2.3.4.5, 300.1.1.1", "firmware 1.2.3.4.5, 300.1.1.1"),
        ("token", "password: hunter22 Bearer abcdef123", "password: <token> Bearer <token>"),
        ("token", "the token ring", "the token ring"),
    ],
)
def test_redaction_presets_take_what_they_name(preset: str, text: str, expected: str) -> None:
    """And leave look-alikes of the plant floor alone."""
    pattern, replacement = msgspec.convert({"preset": preset}, config.Redact).compiled()
    assert pattern.sub(replacement, text) == expected


@pytest.mark.parametrize("preset", ["email", "ipv4", "token"])
def test_redaction_presets_take_linear_time(preset: str) -> None:
    """A hostile line of 256 KiB must not stop the stream."""
    import time

    pattern, replacement = msgspec.convert({"preset": preset}, config.Redact).compiled()
    started = time.perf_counter()
    for unit in ("a", "a@", "1.", "token ", "a.", "password=  ", " "):
        pattern.sub(replacement, unit * (256 * 1024 // len(unit)))
    assert time.perf_counter() - started < 5


def test_a_configuration_is_found_by_environment_then_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$EDGEWATER_CONFIG wins, also when it names nothing, so that a typo is not passed over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEWATER_CONFIG", raising=False)
    _write(tmp_path, SOURCE)
    assert config.find() == Path("edgewater.toml")
    monkeypatch.setenv("EDGEWATER_CONFIG", "/nowhere.toml")
    assert config.find() == Path("/nowhere.toml")


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:9464", ("::1", 9464)),
        ("localhost:80", ("localhost", 80)),
        ("", None),
    ],
)
def test_an_address_is_split(listen: str, expected: tuple[str, int] | None) -> None:
    """IPv4, IPv6 in brackets, the name localhost, or off."""
    assert config.address(listen) == expected


@pytest.mark.parametrize(
    "listen", ["127.0.0.1", ":9464", "0.0.0.0:1", "[::]:1", "127.0.0.1:0", "127.0.0.1:٣", "h:1"]
)
def test_an_address_that_others_could_reach_is_refused(listen: str) -> None:
    """What has no password stays on the box."""
    with pytest.raises(ValueError, match=r"expected|does not appear"):
        config.address(listen)


@pytest.mark.parametrize(
    ("text", "overrides", "flush_ms"),
    [
        ("", [], 2_000),
        ('[ring]\nprofile = "eco"\n', [], 10_000),
        ('[ring]\nprofile = "eco"\nflush_ms = 2000\n', [], 2_000),
        ('[ring]\nprofile = "eco"\n', ["ring.flush_ms=500"], 500),
        ("", ["ring.profile=eco"], 10_000),
        ('[ring]\nprofile = "eco"\n', ["ring.profile=standard"], 2_000),
    ],
)
def test_the_eco_profile_commits_every_ten_seconds_unless_told_otherwise(
    tmp_path: Path, text: str, overrides: list[str], flush_ms: int
) -> None:
    """What is in effect is shown, and loads again as it is."""
    loaded = config.load(_write(tmp_path, text + SOURCE), overrides)
    assert loaded.ring.flush_ms == flush_ms
    assert f"flush_ms = {flush_ms}" in config.show(loaded)
    assert config.load(_write(tmp_path, config.show(loaded))) == loaded


def test_a_profile_that_is_none_is_a_fault_with_a_suggestion(tmp_path: Path) -> None:
    (fault,) = _faults(tmp_path, SOURCE, "ring.profile=ecco")
    assert (fault.dotted, fault.suggestion) == ("ring.profile", 'did you mean "eco"?')
