"""Label sets: names, aliases, sides, codes, and what a user is told about a wrong one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medattn.errors import InputError
from medattn.labels import PACKAGED, LabelSet, Organ

HN = LabelSet.load("hn_oar")

DEEPMIND = [
    "Brain", "Brainstem", "Cochlea-Lt", "Cochlea-Rt", "Lacrimal-Lt", "Lacrimal-Rt", "Lens-Lt", "Lens-Rt",
    "Lung-Lt", "Lung-Rt", "Mandible", "Optic-Nerve-Lt", "Optic-Nerve-Rt", "Orbit-Lt", "Orbit-Rt",
    "Parotid-Lt", "Parotid-Rt", "Spinal-Canal", "Spinal-Cord", "Submandibular-Lt", "Submandibular-Rt",
]  # fmt: skip
OPENKBP = [
    "Brainstem", "SpinalCord", "RightParotid", "LeftParotid", "Esophagus", "Larynx", "Mandible",
]  # fmt: skip
PDDCA = [
    "BrainStem", "Chiasm", "Mandible", "OpticNerve_L", "OpticNerve_R", "Parotid_L", "Parotid_R",
    "Submandibular_L", "Submandibular_R",
]  # fmt: skip
TOTALSEGMENTATOR = [
    "brain", "brainstem", "spinal_cord", "esophagus", "trachea", "thyroid_gland", "mandible", "skull",
    "eye_left", "eye_right", "eye_lens_left", "eye_lens_right", "optic_nerve_left", "optic_nerve_right",
    "parotid_gland_left", "parotid_gland_right", "submandibular_gland_right", "submandibular_gland_left",
    "common_carotid_artery_left", "lung_left",
]  # fmt: skip
HAN_SEG = [
    "A_Carotid_L", "A_Carotid_R", "Bone_Mandible", "Brainstem", "BuccalMucosa", "Cavity_Oral", "Cochlea_L",
    "Cochlea_R", "Cricopharyngeus", "Esophagus_S", "Glnd_Lacrimal_L", "Glnd_Lacrimal_R", "Glnd_Submand_L",
    "Glnd_Submand_R", "Glnd_Thyroid", "Glottis", "Larynx_SG", "Lips", "OpticChiasm", "OpticNrv_L",
    "OpticNrv_R", "Parotid_L", "Parotid_R", "Pituitary", "SpinalCord",
]  # fmt: skip


@pytest.mark.parametrize("names", [DEEPMIND, OPENKBP, PDDCA, TOTALSEGMENTATOR, HAN_SEG], ids=lambda n: n[0])
def test_names_of_public_data_sets_are_known_and_none_is_claimed_twice(names: list[str]) -> None:
    organs = HN.resolve(names)
    assert len({organ.name for organ in organs}) == len(names)


@pytest.mark.parametrize("name", [*DEEPMIND, *OPENKBP, *PDDCA, *TOTALSEGMENTATOR, *HAN_SEG])
def test_a_name_that_says_left_becomes_a_left_organ(name: str) -> None:
    words = {
        "left": ("-Lt", "_L", "_left", "Left"),
        "right": ("-Rt", "_R", "_right", "Right"),
    }
    expected = [s for s, marks in words.items() if name.endswith(marks[:3]) or name.startswith(marks[3])]
    assert HN.describe(name).side == (expected[0] if expected else None)


@pytest.mark.shared
@pytest.mark.parametrize("folder", ["hn_ct", "hn_oar_two_readers"])
def test_every_label_of_the_real_data_is_known(shared_data: Path, folder: str) -> None:
    names = list(json.loads((shared_data / folder / "labels.json").read_text()).values())
    assert len({organ.name for organ in HN.resolve(names)}) == len(names)


def test_case_spaces_and_punctuation_do_not_matter() -> None:
    for spelling in (
        "parotid_l",
        "PAROTID L",
        "Parotid, left",
        "lt. parotid",
        "L_PAROTID",
        "left parotid gland",
    ):
        assert HN.describe(spelling).name == "Parotid_L"


def test_no_spelling_leads_to_two_organs_and_every_spelling_leads_home() -> None:
    spellings = [(name, organ.name) for organ in HN.organs for name in (organ.name, *organ.aliases)]
    assert [(name, HN.describe(name).name) for name, _ in spellings] == spellings


def test_pairs_share_code_tolerance_and_meaning_and_differ_in_side() -> None:
    for organ in HN.organs:
        if organ.pair is None:
            assert organ.side is None
            assert not organ.name.endswith(("_L", "_R"))
        else:
            other = HN.describe(organ.pair)
            assert {organ.side, other.side} == {"left", "right"}
            assert (organ.side == "left") == organ.name.endswith("_L")
            assert (organ.code, organ.meaning, organ.tolerance_mm) == (
                other.code,
                other.meaning,
                other.tolerance_mm,
            )


def verhoeff_valid(number: str) -> bool:
    """SNOMED CT identifiers end in a Verhoeff check digit (SNOMED CT Technical Guide, SCTID check digit)."""
    multiply = [[i + j if i + j < 5 else i + j - 5 for j in range(5)] + [] for i in range(5)]
    table = [[0] * 10 for _ in range(10)]
    for i, j in itertools.product(range(10), repeat=2):
        rotate = multiply[i % 5][j % 5] if i < 5 else multiply[(i - j) % 5][0]
        table[i][j] = rotate + 5 * ((i >= 5) ^ (j >= 5))
    permutation = [list(range(10)), [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]]
    for _ in range(6):
        permutation.append([permutation[-1][permutation[1][i]] for i in range(10)])
    check = 0
    for place, digit in enumerate(reversed(number)):
        check = table[check][permutation[place % 8][int(digit)]]
    return check == 0


def test_snomed_codes_have_a_right_check_digit_and_one_structure_each() -> None:
    assert verhoeff_valid("7771000")
    assert verhoeff_valid("24028007")
    assert not verhoeff_valid("7771001")
    for organ in HN.organs:
        assert organ.code is None or verhoeff_valid(organ.code), organ.name
    stems = {
        (organ.code, organ.name.removesuffix("_L").removesuffix("_R")) for organ in HN.organs if organ.code
    }
    assert len({code for code, _ in stems}) == len(stems)


def test_colours_can_be_told_apart() -> None:
    for a, b in itertools.combinations(HN.organs, 2):
        assert sum((x - y) ** 2 for x, y in zip(a.color, b.color, strict=True)) >= 30**2, (a.name, b.name)


def test_tolerances_are_those_of_nikolov_and_say_so() -> None:
    published_mm = {
        "Brain": 1.01, "Brainstem": 2.50, "Cochlea_L": 1.25, "Glnd_Lacrimal_L": 2.50, "Lens_L": 0.98,
        "Lung_L": 2.42, "Bone_Mandible": 1.01, "OpticNrv_L": 2.50, "Eye_L": 1.65, "Parotid_L": 2.85,
        "SpinalCanal": 1.17, "SpinalCord": 2.93, "Glnd_Submand_L": 2.02,
    }  # fmt: skip
    assert {o.name: o.tolerance_mm for o in HN.organs if o.tolerance_mm and o.side != "right"} == published_mm
    for organ in HN.organs:
        assert (organ.tolerance_mm is None) == (organ.tolerance_source is None)
        assert organ.tolerance_source is None or "not confirmed" in organ.tolerance_source


@given(st.permutations([o.name for o in HN.organs]))
def test_mirroring_twice_is_nothing_and_once_swaps_the_sides(names: list[str]) -> None:
    mirrored = HN.mirror(names)
    assert [mirrored[m] for m in mirrored] == list(range(len(names)))
    swap = {"left": "right", "right": "left", None: None}
    for name, target in zip(names, mirrored, strict=True):
        assert HN.describe(names[target]).side == swap[HN.describe(name).side]
        assert HN.describe(names[target]).code == HN.describe(name).code


def test_mirroring_uses_the_names_of_the_data_and_refuses_a_lone_side_or_a_double() -> None:
    assert HN.mirror(["RightParotid", "Brainstem", "LeftParotid"]) == (2, 1, 0)
    with pytest.raises(InputError, match="Parotid_L has a side, but its pair Parotid_R"):
        HN.mirror(["LeftParotid", "Brainstem"])
    with pytest.raises(InputError, match="'Mandible' and 'Bone_Mandible' are the same organ"):
        HN.mirror(["Mandible", "Bone_Mandible"])


def test_all_unknown_names_are_reported_at_once_with_the_nearest_known_one() -> None:
    with pytest.raises(InputError) as caught:
        HN.resolve(["Brainstem", "Parrotid_L", "Mandibel", "PTV70"])
    assert len(caught.value.problems) == 3
    assert "'Parrotid_L'" in caught.value.problems[0]
    assert "did you mean 'Parotid_L'?" in caught.value.problems[0]
    assert "did you mean 'Bone_Mandible'?" in caught.value.problems[1]
    assert "did you mean" not in caught.value.problems[2]
    assert HN.find("PTV70") is None
    assert HN.describe("PTV70") == Organ("PTV70")


def test_a_label_set_of_ones_own_loads_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "pelvis.yaml"
    path.write_text(
        "organs:\n"
        "- {name: Bladder, aliases: [Blase], code: '89837001', meaning: Bladder, color: [9, 8, 7]}\n"
        "- {name: Femur_L, stems: [Femoral head], side: left, pair: Femur_R, tolerance_mm: 2, "
        "tolerance_source: our own choice}\n"
        "- {name: Femur_R, stems: [Femoral head], side: right, pair: Femur_L}\n"
    )
    pelvis = LabelSet.load(path)
    assert pelvis.name == "pelvis"
    assert pelvis.find("blase") == Organ("Bladder", ("Blase",), "89837001", "Bladder", (9, 8, 7))
    assert [pelvis.describe(n).name for n in ("Lt femoral head", "FemoralHead_R")] == ["Femur_L", "Femur_R"]
    assert pelvis.describe("Femur L").tolerance_mm == 2


def test_an_unknown_label_set_lists_the_packaged_ones() -> None:
    with pytest.raises(InputError, match="pelvis: no such label set; give a YAML file or one of: hn_oar"):
        LabelSet.load("pelvis")
    assert (PACKAGED / "hn_oar.yaml").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("organs: [", "not a YAML file"),
        ("", "not a label set"),
        ("organs: 3", "not a label set"),
        ("- Brain", "not a label set"),
        ("organs: [Brain, Cord]", "not a label set"),
        ("organs: [{aliases: [x]}]", "organ number 1 has name None"),
        ("organs: [{name: no}]", "organ number 1 has name False"),
        ("organs: [{name: A, colour: [1, 2, 3]}]", "unknown key 'colour'"),
        ("organs: [{name: A, color: [1, 2]}]", "three whole numbers from 0 to 255"),
        ("organs: [{name: A, color: [0, 0, 256]}]", "three whole numbers from 0 to 255"),
        ("organs: [{name: A, color: red}]", "three whole numbers from 0 to 255"),
        ("organs: [{name: A, code: 12738006}]", "in quotes where it looks like a number"),
        ("organs: [{name: A, aliases: B}]", "expected a list of names"),
        ("organs: [{name: A, aliases: [1]}]", "expected a list of names"),
        ("organs: [{name: A, stems: [B]}]", "stems are completed with a side"),
        ("organs: [{name: A, tolerance_mm: 2.5 mm}]", "tolerance_mm '2.5 mm'"),
        ("organs: [{name: A, tolerance_mm: 0}]", "tolerance_mm 0"),
        ("organs: [{name: A}, {name: A}]", "organ A is listed 2 times"),
        ("organs: [{name: A, aliases: [x]}, {name: B, aliases: [X]}]", "'X' belongs to A and to B"),
        ("organs: [{name: A, aliases: [b]}, {name: B}]", "'B' belongs to A and to B"),
        ("organs: [{name: A, side: left}]", "expected left or right and a pair, or neither"),
        ("organs: [{name: A, side: up, pair: B}, {name: B}]", "side 'up'"),
        ("organs: [{name: A, side: left, pair: B}]", "its pair B must exist"),
        ("organs: [{name: A, side: left, pair: B}, {name: B, side: left, pair: A}]", "lie on the other side"),
    ],
)
def test_a_malformed_label_set_is_refused_with_its_reason(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        LabelSet.load(path)
    assert message in str(caught.value)
    assert "own" in str(caught.value)


def test_a_binary_file_is_no_label_set(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="not a YAML file"):
        LabelSet.load(path)


def test_all_problems_of_a_label_set_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("organs: [{name: A, color: red}, {name: B, tolerance_mm: -1}, {name: C, code: 1}]")
    with pytest.raises(InputError) as caught:
        LabelSet.load(path)
    assert len(caught.value.problems) == 3
