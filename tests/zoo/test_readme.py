"""README.md lists exactly the model types of the zoo."""

import re
from pathlib import Path

from tests.zoo.zoo_table import TESTED_TYPES, ZOO

README = Path(__file__).parents[2] / "README.md"


def test_the_list_of_tested_types_is_that_of_the_zoo() -> None:
    (section,) = re.findall(r"## Models\n(.*?)\n## ", README.read_text(), re.DOTALL)
    (listed,) = re.findall(r"^`.*`$", section, re.MULTILINE)[:1]
    assert re.findall(r"`(\w+)`", listed) == list(TESTED_TYPES)
    assert f"{len(TESTED_TYPES)} model types" in section


def test_every_family_is_in_every_test_run() -> None:
    assert sum(kind.represents for kind in ZOO.values()) >= 20
