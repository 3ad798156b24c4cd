"""What is made from the settings' docstrings: the commented example and the JSON Schema for editors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from pipeline import config
from pipeline.config import Config

REPOSITORY = Path(__file__).parents[2]


def test_the_shipped_example_is_what_the_settings_say() -> None:
    """deploy/edgewater.toml never falls behind the code; `make format` does not touch it, this says how."""
    shipped = (REPOSITORY / "deploy" / "edgewater.toml").read_text(encoding="utf-8")
    assert shipped == config.example(), (
        "write it anew: python -c 'from pipeline.config import example; print(example(), end=\"\")'"
    )


def test_the_example_loads_without_a_fault_and_holds_the_defaults(tmp_path: Path) -> None:
    """A user who changes nothing but the source gets exactly the documented defaults."""
    path = tmp_path / "edgewater.toml"
    path.write_text(config.example(), encoding="utf-8")
    loaded = config.load(path)
    assert msgspec.structs.replace(loaded, sources=()) == Config()
    assert [source.path for source in loaded.sources] == ["/var/spool/edgewater/*.jsonl"]


def test_every_commented_line_of_the_example_is_valid_when_uncommented(tmp_path: Path) -> None:
    """Taking a "#" away is how the example says to change a key, so it must work for each of them."""
    text = re.sub(r"^#(?=[a-z_]+ = |\[\[)", "", config.example(), flags=re.MULTILINE)
    path = tmp_path / "edgewater.toml"
    path.write_text(text, encoding="utf-8")
    loaded = config.load(path)
    assert msgspec.structs.replace(loaded, sources=(), redact=()) == Config()
    assert loaded.sources[0].deadband == {"pressure": 0.05, "flow": 2.0}
    assert [rule.preset for rule in loaded.redact] == ["email", ""]


def test_the_example_takes_other_places(tmp_path: Path) -> None:
    """`init` writes a configuration for the folder that the user names, whatever its name."""
    path = tmp_path / "edgewater.toml"
    path.write_text(config.example('da"ta', "in/*.jsonl"), encoding="utf-8")
    loaded = config.load(path)
    assert loaded.data_dir == tmp_path / 'da"ta'
    assert loaded.sources[0].path == str(tmp_path / "in/*.jsonl")


def _properties(schema: dict[str, Any], at: str = "") -> dict[str, dict[str, Any]]:
    """List every property of a schema by its dotted name."""
    found: dict[str, dict[str, Any]] = {}
    for name, entry in schema.get("properties", {}).items():
        found[f"{at}{name}"] = entry
        found |= _properties(entry, f"{at}{name}.") | _properties(entry.get("items", {}), f"{at}{name}.")
    return found


def test_the_schema_describes_every_key() -> None:
    """Editors show the same words as the example."""
    properties = _properties(config.schema())
    assert len(properties) > 50
    undescribed = [
        name for name, entry in properties.items() if not entry.get("description") and "items" not in entry
    ]
    assert undescribed == []


def test_the_schema_knows_limits_defaults_and_what_is_required() -> None:
    """So that an editor can complain as the program would."""
    schema = config.schema()
    properties = _properties(schema)
    assert schema["additionalProperties"] is False
    assert properties["trigger.min_samples"]["minimum"] == 32
    assert properties["trigger.min_samples"]["default"] == 300
    assert properties["ring.max_bytes"]["default"] == "256MiB"
    assert properties["update.profile"]["enum"] == ["fast", "full", "tiny"]
    assert properties["sources"]["items"]["required"] == ["name", "kind"]
    assert re.search(properties["gateway.name"]["pattern"], "site-3")
    assert not re.search(properties["gateway.name"]["pattern"], "Site\n")
    assert [option["type"] for option in properties["sources.deadband"]["anyOf"]] == ["number", "object"]
