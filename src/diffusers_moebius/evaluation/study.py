"""
Blind studies: which of several fillings people prefer, without their knowing whose it is (paper, section 4.3).

A study is a folder: `study.json` names its cases, `pictures/` holds them under random names, and `answers/` gets a
file a person. Which picture is whose stands in a file beside the folder, so that the folder can be shown to anyone.
"""

import json
import math
import random
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from ..pictures.mask import dilate_mask
from .methods import Method, blank_hole

CONSENT = (
    "You will see photos in which a part was filled in by a program, several fillings of each. Choose the one that "
    "looks best: most natural, and with the least that gives it away. Your choices and the time that they take are "
    "kept under a random number; nothing about you is asked or kept. You may stop at any time, and go on later in the "
    "same browser."
)


@dataclass(frozen=True)
class Answer:
    """
    A choice.

    Args:
        person (`str`): A random number that stands for a person.
        case (`str`): The case.
        choice (`str`): Name of the picture that was chosen.
        seconds (`float`): How long it took.
    """

    person: str
    case: str
    choice: str
    seconds: float


def key_path(folder: Path) -> Path:
    """Where it stands which picture is whose: beside the folder."""
    return folder.with_name(f"{folder.name}-key.json")


def photos_of(
    folder: str | Path, limit: int | None = None, seed: int = 0, dilate: bool = False
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """
    The photos `NAME.jpg` (or .png, .webp) of a folder with their masks `NAME.mask.png`, as [`make_study`] takes them.

    Args:
        folder (`str` or `Path`): The folder.
        limit (`int`, *optional*): How many, drawn by the seed; all by default.
        seed (`int`, defaults to 0): Seed of the draw, and of how much masks grow.
        dilate (`bool`, defaults to `False`): Grows each mask as the paper grows its own, by a square of 3, 5 or 7 px
            (at 512 px) once or twice: for removals by objects' own masks.

    Raises:
        ValueError: If there are none, or a mask has another size than its photo.
    """
    masks = sorted(Path(folder).glob("*.mask.png"))
    if limit is not None and limit < len(masks):
        masks = sorted(random.Random(seed).sample(masks, limit))
    if not masks:
        raise ValueError(f"`photos` must hold photos NAME.jpg with masks NAME.mask.png, but {folder} holds none.")
    for path in masks:
        name = path.name.removesuffix(".mask.png")
        files = [path.with_name(f"{name}{suffix}") for suffix in (".jpg", ".jpeg", ".png", ".webp")]
        photo = next((file for file in files if file.is_file()), None)
        if photo is None:
            raise ValueError(f"`photos`: there is no photo for the mask {path}.")
        with Image.open(photo) as image, Image.open(path) as mask:
            if image.size != mask.size:
                raise ValueError(f"`photos`: {path} is {mask.size} px, but its photo {image.size} px.")
            hole = np.asarray(mask.convert("L")) >= 128
            if dilate:
                draw = random.Random(f"{seed} {name}")
                hole = dilate_mask(hole, round(draw.randint(1, 3) * min(image.size) / 512) * draw.randint(1, 2))
            yield name, np.asarray(image.convert("RGB")), hole


def make_study(
    photos: Iterable[tuple[str, np.ndarray, np.ndarray]],
    methods: dict[str, Method],
    folder: str | Path,
    layout: str = "rows",
    seed: int = 0,
    consent: str = CONSENT,
) -> int:
    """
    Makes a study.

    Args:
        photos (iterable of `tuple[str, np.ndarray, np.ndarray]`): Name, photo `[H, W, 3]` in `uint8`, and mask
            `[H, W]`, `True` in the hole.
        methods (`dict[str, Method]`): At least two, by name; they get the photos with their holes blanked.
        folder (`str` or `Path`): The study's folder, which must not exist.
        layout (`str`, defaults to `"rows"`): `"rows"` shows all fillings of a photo at once, `"pairs"` each two.
        seed (`int`, defaults to 0): Seed of fillings and order.
        consent (`str`): What people read before they begin.

    Returns:
        `int`: The number of cases.

    Raises:
        ValueError: If there are not 2 to 9 methods, the folder or its key exists, or there are no photos.
    """
    folder = Path(folder)
    if not 2 <= len(methods) <= 9:
        raise ValueError(f"`methods` must be 2 to 9, but are {len(methods)}.")
    if layout not in ("rows", "pairs"):
        raise ValueError(f"`layout` must be rows or pairs, but is {layout!r}.")
    for path in (folder, key_path(folder)):
        if path.exists():
            raise ValueError(f"`folder`: {path} exists already.")
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    cases, key = [], {}
    for index, (name, photo, mask) in enumerate(photos):
        blanked = blank_hole(photo, mask)
        shown = _save(np.where((mask & dilate_mask(~mask, 2))[..., None], np.uint8([255, 64, 64]), blanked), pictures)
        options = {}
        for method_name, method in methods.items():
            result = method(blanked.copy(), mask.copy(), name, seed + index)
            options[method_name] = _save(np.where(mask[..., None], result, photo), pictures)
            key[options[method_name]] = {"method": method_name, "photo": name}
        groups = [tuple(options)] if layout == "rows" else combinations(options, 2)
        cases += [{"photo": shown, "options": [options[each] for each in group]} for group in groups]
    if not cases:
        raise ValueError("`photos` must hold at least one photo.")
    random.Random(seed).shuffle(cases)
    for number, case in enumerate(cases):
        case["id"] = f"{number + 1:04d}"
        random.Random(f"{seed} {number}").shuffle(case["options"])
    (folder / "answers").mkdir()
    key_path(folder).write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    # Last, so that a study that was interrupted is none.
    (folder / "study.json").write_text(
        json.dumps({"consent": consent, "cases": cases}, indent=1) + "\n", encoding="utf-8"
    )
    return len(cases)


def _save(picture: np.ndarray, folder: Path) -> str:
    name = f"{secrets.token_hex(8)}.png"
    Image.fromarray(picture).save(folder / name)
    return name


class Study:
    """
    A study that was made, and its answers.

    Args:
        folder (`str` or `Path`): Its folder.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            made = json.loads((self.folder / "study.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"`folder` must hold a study, but there is no {self.folder / 'study.json'}.") from None
        self.consent: str = made["consent"]
        self.cases: dict[str, dict] = {case["id"]: case for case in made["cases"]}

    def order(self, person: str) -> list[str]:
        """The cases in the order in which a person sees them."""
        cases = list(self.cases)
        random.Random(person).shuffle(cases)
        return cases

    def options(self, person: str, case: str) -> list[str]:
        """The pictures of a case in the order in which a person sees them, so that no place favours a method."""
        options = list(self.cases[case]["options"])
        random.Random(f"{person} {case}").shuffle(options)
        return options

    def _file(self, person: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{16}", person):
            raise ValueError(f"`person` must be sixteen hexadecimal digits, but is {person!r}.")
        return self.folder / "answers" / f"{person}.jsonl"

    def answer(self, person: str, case: str, choice: str, seconds: float) -> None:
        """Keeps a choice; only the first of a case counts."""
        if choice not in self.cases.get(case, {"options": ()})["options"]:
            raise ValueError(f"`choice` must be a picture of the case {case}, but is {choice!r}.")
        if case in self.answered(person):
            return
        line = json.dumps({"case": case, "choice": choice, "seconds": round(seconds, 2)})
        with self._file(person).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def answered(self, person: str) -> dict[str, Answer]:
        """A person's answers by case; a line that was cut off does not count."""
        file, answers = self._file(person), {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            try:
                given = json.loads(line)
            except json.JSONDecodeError:
                continue
            answers.setdefault(given["case"], Answer(person, **given))
        return answers

    def answers(self) -> list[Answer]:
        """All people's answers."""
        people = sorted(path.stem for path in (self.folder / "answers").glob("*.jsonl"))
        return [answer for person in people for answer in self.answered(person).values()]


def wilson_interval(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, square = count / total, z * z
    middle = (share + square / (2 * total)) / (1 + square / total)
    reach = z * math.sqrt(share * (1 - share) / total + square / (4 * total**2)) / (1 + square / total)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def binomial_test(count: int, total: int, share: float) -> float:
    """The exact two-sided p-value of `count` successes of `total`, each with the probability `share`."""

    def log_probability(k: int) -> float:
        log_ways = math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        return log_ways + k * math.log(share) + (total - k) * math.log1p(-share)

    limit = log_probability(count) + 1e-7  # equal ones count, whatever the rounding
    return min(1.0, sum(math.exp(p) for p in map(log_probability, range(total + 1)) if p <= limit))


def fleiss_kappa(table: np.ndarray) -> float:
    """
    Agreement between people beyond chance (Fleiss 1971): 1 is complete, 0 that of chance.

    Args:
        table (`np.ndarray` of shape `[cases, categories]`): How many people chose each category; a case that fewer
            than two people answered is left out. Cases may have different numbers of people.

    Returns:
        `float`: NaN where it is not defined.
    """
    table = np.asarray(table, float)
    table = table[table.sum(1) >= 2]
    people = table.sum(1)
    if not len(table):
        return math.nan
    agreement = ((table**2).sum(1) - people) / (people * (people - 1))
    chance = ((table.sum(0) / table.sum()) ** 2).sum()
    return math.nan if chance == 1 else float((agreement.mean() - chance) / (1 - chance))


def bootstrap_interval(wins: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """
    The 95 % interval of a share when people are drawn anew, each with all of their answers.

    Args:
        wins (`np.ndarray` of shape `[people, 2]`): How often each person chose the method, and could have.
        draws (`int`, defaults to 2000): Draws.
        seed (`int`, defaults to 0): Seed.
    """
    picks = np.random.default_rng(seed).integers(0, len(wins), (draws, len(wins)))
    sums = wins[picks].sum(1)
    low, high = np.percentile(sums[:, 0] / sums[:, 1], (2.5, 97.5))
    return float(low), float(high)


def report_study(study: Study) -> dict:
    """
    What the answers say.

    Returns:
        `dict`: `people`, `answers`, `kappa`, and `methods` by name, each with `chosen`, `shown`, `share`, `wilson`,
        `bootstrap` (`None` for fewer than two people) and `p`, of a test against choosing at random.

    Raises:
        ValueError: If the key is not beside the study, or nobody has answered yet.
    """
    path = key_path(study.folder)
    if not path.is_file():
        raise ValueError(f"The study's key {path} is not there; without it nobody knows which picture is whose.")
    method_of = {name: entry["method"] for name, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    answers = study.answers()
    if not answers:
        raise ValueError(f"Nobody has answered the study {study.folder} yet.")
    names = sorted(set(method_of.values()))
    people = sorted({answer.person for answer in answers})
    shown, chosen = Counter(), Counter()
    by_person = {name: np.zeros((len(people), 2)) for name in names}
    table = {case: Counter() for case in study.cases}
    chances: dict[str, list[float]] = {name: [] for name in names}
    for answer in answers:
        winner = method_of[answer.choice]
        options = [method_of[option] for option in study.cases[answer.case]["options"]]
        table[answer.case][winner] += 1
        for name in options:
            shown[name] += 1
            chosen[name] += name == winner
            by_person[name][people.index(answer.person)] += (name == winner, 1)
            chances[name].append(1 / len(options))
    methods = {}
    for name in names:
        if not shown[name]:
            continue
        seen = by_person[name][by_person[name][:, 1] > 0]
        methods[name] = {
            "chosen": chosen[name],
            "shown": shown[name],
            "share": chosen[name] / shown[name],
            "wilson": wilson_interval(chosen[name], shown[name]),
            "bootstrap": bootstrap_interval(seen) if len(seen) > 1 else None,
            "p": binomial_test(chosen[name], shown[name], float(np.mean(chances[name]))),
        }
    counts = np.array([[table[case][name] for name in names] for case in study.cases])
    return {"people": len(people), "answers": len(answers), "kappa": fleiss_kappa(counts), "methods": methods}


def report_markdown(report: dict) -> str:
    """Writes what [`report_study`] returns as a Markdown table."""
    lines = [
        f"{report['answers']} answers of {report['people']} people; Fleiss' κ {report['kappa']:.2f}",
        "",
        "| method | chosen | of | share | 95 % (Wilson) | 95 % (people drawn anew) | p against chance |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    percent = lambda pair: "–" if pair is None else f"{100 * pair[0]:.1f} to {100 * pair[1]:.1f} %"  # noqa: E731
    for name, row in sorted(report["methods"].items(), key=lambda item: -item[1]["share"]):
        lines.append(
            f"| {name} | {row['chosen']} | {row['shown']} | {100 * row['share']:.1f} % | {percent(row['wilson'])} | "
            f"{percent(row['bootstrap'])} | {row['p']:.3g} |"
        )
    return "\n".join(lines)
