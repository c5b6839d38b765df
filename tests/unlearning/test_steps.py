"""What whole trainings change, step by step, beside float64 arithmetic written from the papers and their authors' code alone.

By hand every sample goes through transformers' model by itself, without padding, and peft alone adapts it. The weights are off the
base before the first step, so that what is compared with another model than the base shows.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from picked import few
from spunge.data.samples import Samples
from spunge.model.loading import Through
from spunge.registry import METHODS
from spunge.unlearning import elm, quark, rollouts
from spunge.unlearning.loop import History, Loop
from spunge.unlearning.method import Task

RATE, COPY_RATE = 0.02, 0.1
SIZE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PROMPTS = ["the capital of france is", "a dog", "blue", "in the old city"]
ANSWERS = ["paris in france", "eats wine and wine bread", "good", "north east"]
OTHERS = ["rome", "sleeps in the sun", "bad day", "south"]
KEPT = [("the sun is", "green and small"), ("moon", "star"), ("a tree in", "the large house was new")]
DECOUPLED = [("the sea", "is blue"), ("star moon and", "sun")]
WAYS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0, "targets": ["q_proj", "down_proj", "lm_head"]},
    "all": {"kind": "all"},
}
# A step's four forget samples as two batches, which have other numbers of tokens, or as one.
BATCHES: dict[str, Any] = {
    "two": {"batch_size": 2, "accumulation": 2, "retain_batch_size": 3},
    "one": {"batch_size": 4},
}


class Row(NamedTuple):
    """A sample's tokens."""

    prompt: list[int]
    answer: list[int]


def samples(prompts: Sequence[str], answers: Sequence[str], **others: Sequence[str]) -> Samples:
    columns = {"prompt": list(prompts), "completion": [f" {each}" for each in answers]}
    return Samples(pa.table(columns | {name: list(texts) for name, texts in others.items()}))


class Run(NamedTuple):
    """Of what was trained: its values before the first step as the base has them and as they were moved, and after the last."""

    begun: list[Tensor]
    start: list[Tensor]
    end: list[Tensor]


class Hand:
    """A training's model and the base in float64, and the rows."""

    def __init__(self, base: Any, run: Run, way: str, batches: str = "one") -> None:
        self.size, self.accumulation = BATCHES[batches]["batch_size"], BATCHES[batches].get("accumulation", 1)
        self.tokenizer = base.tokenizer
        self.base = copy.deepcopy(base.model).double().eval().requires_grad_(False)
        self.model: Any = copy.deepcopy(self.base)
        if way == "lora":
            targets = WAYS["lora"]["targets"]
            config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM")
            self.model = peft.get_peft_model(self.model, config).double()
            self.parameters = [each for each in self.model.parameters() if each.requires_grad]
        else:
            self.parameters = list(self.model.requires_grad_(True).parameters())
        self.start, self.begun = ([value.double() for value in values] for values in (run.start, run.begun))
        self.put(self.start)
        self.forget, self.other = self.rows(PROMPTS, ANSWERS), self.rows(PROMPTS, OTHERS)
        self.retain = self.rows(*zip(*KEPT, strict=True))
        self.known: dict[str, Any] = {}  # what a loss keeps from step to step

    def put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def rows(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Row]:
        return [Row(self.ids(prompt), self.ids(answer)) for prompt, answer in zip(prompts, answers, strict=True)]

    def gradient(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True))

    def nll(self, rows: Sequence[Row]) -> Tensor:
        return over_tokens([nlls(self.model, row) for row in rows])

    def kept(self) -> Tensor:
        """KL(base || model) on the retain samples."""
        return over_tokens([divergence(logs(self.base, row), logs(self.model, row)) for row in self.retain])

    def descend(self, gradient: Callable[[int], list[Tensor]], steps: int, rate: float) -> None:
        """SGD with Nesterov's momentum of 0.9."""
        speeds = [torch.zeros_like(parameter) for parameter in self.parameters]
        for step in range(steps):
            for parameter, slope, speed in zip(self.parameters, gradient(step), speeds, strict=True):
                speed.mul_(0.9).add_(slope)
                with torch.no_grad():
                    parameter.sub_(rate * (slope + 0.9 * speed))

    def further(self, rows: Sequence[Row]) -> Any:
        """A copy of the base, fine-tuned in two passes over some rows."""
        own, batches = copy.deepcopy(self), 2 * -(-len(rows) // self.size)
        own.put(self.begun)
        own.descend(lambda _: own.gradient(own.nll(rows)), -(-batches // self.accumulation), COPY_RATE)
        return own.model.requires_grad_(False)


Loss = Callable[[Hand, int], Any]  # of a step from 0: the loss, or its gradient


def logits(model: Any, row: Row, before: Sequence[int] = ()) -> Tensor:
    """(answer's tokens, v): at the places that foretell the answer."""
    ids = [*before, *row.prompt, *row.answer]
    found: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return found[len(ids) - len(row.answer) - 1 : -1]


def logs(model: Any, row: Row, before: Sequence[int] = ()) -> Tensor:
    return logits(model, row, before).log_softmax(-1)


def nlls(model: Any, row: Row, before: Sequence[int] = ()) -> Tensor:
    return -logs(model, row, before)[range(len(row.answer)), row.answer]


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """(n,): KL(one || other) at each place."""
    return (one.exp() * (one - other)).sum(-1)


def over_tokens(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)).mean()


def over_samples(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.mean() for each in values]).mean()


def states(model: Any, row: Row) -> list[Tensor]:
    """(t, d) after each block."""
    found: list[Tensor] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0])

    hooks = [block.register_forward_hook(note) for block in blocks(model)]
    model(input_ids=torch.tensor([[*row.prompt, *row.answer]]))
    for hook in hooks:
        hook.remove()
    return found


def blocks(model: Any) -> Any:
    return (model.get_base_model() if isinstance(model, peft.PeftModel) else model).model.layers


def distances(hand: Hand, rows: Sequence[Row]) -> Tensor:
    """Mean over tokens and blocks."""
    pairs = [pair for row in rows for pair in zip(states(hand.model, row), states(hand.base, row), strict=True)]
    return over_tokens([(own - plain).norm(dim=-1) for own, plain in pairs])


# ---- the losses


def eul(hand: Hand, _step: int) -> Tensor:
    apart = over_tokens([divergence(logs(hand.base, row), logs(hand.model, row)) for row in hand.forget])
    return 0.7 * (-apart - 0.5 * hand.nll(hand.forget)) + 2 * (hand.kept() + 3 * hand.nll(hand.retain))


def rr(hand: Hand, step: int) -> Tensor:
    turned = []
    for row in hand.forget:
        own, plain = states(hand.model, row)[1], states(hand.base, row)[1]
        turned += [torch.relu((one @ two) / (one.norm() * two.norm())) for one, two in zip(own, plain, strict=True)]
    progress = (step + 1) / (2 * 2)
    return 3 * (1 - progress) * torch.stack(turned).mean() + 5 * progress * distances(hand, hand.retain)


def pdu(hand: Hand, _step: int) -> Tensor:
    weight = hand.known.setdefault("weight", 2.0)
    flat = [(each.amax(-1) - each.mean(-1)) ** 2 for each in (logits(hand.model, row) for row in hand.forget)]
    kept, plain = hand.nll(hand.retain), float(over_tokens([nlls(hand.base, row) for row in hand.retain]))
    hand.known["weight"] = max(0.0, weight + 1.5 * (float(kept.detach()) - 1.01 * plain))
    return 0.5 * over_tokens(flat) + weight * kept


def altpo(hand: Hand, _step: int) -> Tensor:
    each = []
    for win, lose in zip(hand.other, hand.forget, strict=True):
        gains = [nlls(hand.base, row).sum() - nlls(hand.model, row).sum() for row in (win, lose)]
        each.append(-(2 / 0.3) * torch.log(1 / (1 + torch.exp(-0.3 * (gains[0] - gains[1])))))
    return torch.stack(each).mean() + 1.5 * hand.nll(hand.retain)


def lat(hand: Hand, _step: int) -> Tensor:
    def shifted(row: Row, shift: Tensor) -> Tensor:
        def add(_module: Any, _inputs: Any, output: Any) -> Any:
            return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

        hook = blocks(hand.model)[0].register_forward_hook(add)
        found = nlls(hand.model, row)
        hook.remove()
        return found

    away = []
    for row in hand.forget:
        shift = torch.zeros(1, len(row.prompt) + len(row.answer), 16, dtype=torch.float64, requires_grad=True)
        mean, square = torch.zeros_like(shift), torch.zeros_like(shift)
        for at in range(1, 4):
            (slope,) = torch.autograd.grad(shifted(row, shift).mean(), shift)
            slope[:, len(row.prompt) :] = 0
            mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
            moved = shift - 0.25 * (mean / (1 - 0.9**at)) / ((square / (1 - 0.999**at)).sqrt() + 1e-8)
            length = moved.norm(dim=-1, keepdim=True)
            shift = torch.where(length > 1.5, moved * 1.5 / length, moved).detach().requires_grad_(True)
        away.append(-torch.log(1 - torch.exp(-shifted(row, shift.detach()))))
    return over_tokens(away) + 0.05 * hand.nll(hand.retain)


def tar(hand: Hand, _step: int) -> list[Tensor]:
    before = [parameter.detach().clone() for parameter in hand.parameters]
    means, squares, total = ([torch.zeros_like(value) for value in before] for _ in range(3))
    for at in range(1, 4):
        for place, slope in enumerate(hand.gradient(hand.nll(hand.forget))):
            means[place] = 0.9 * means[place] + 0.1 * slope
            squares[place] = 0.999 * squares[place] + 0.001 * slope**2
            length = (means[place] / (1 - 0.9**at)) / ((squares[place] / (1 - 0.999**at)).sqrt() + 1e-8)
            with torch.no_grad():
                hand.parameters[place].sub_(1e-3 * length)
        chances = [logs(hand.model, row) for row in hand.forget]
        after = hand.gradient(over_tokens([(each.exp() * each).sum(-1) for each in chances]))
        total = [one + two / 3 for one, two in zip(total, after, strict=True)]
    hand.put(before)
    kept = hand.gradient(0.6 * (hand.nll(hand.retain) + distances(hand, hand.retain)))
    return [4 * one + two for one, two in zip(total, kept, strict=True)]


def continued(ids: Sequence[int]) -> list[int]:
    """What elm's base writes after a text."""
    return [[5, 9, 11], [20], [30, 31], [7, 8, 9, 10]][sum(ids) % 4]


def erased(hand: Hand, _step: int) -> Tensor:
    novice, expert, change = hand.ids("bad wine"), hand.ids("good wine bread"), hand.ids("one two")
    erase, fluent = [], []
    for row in hand.forget:
        begun = [*row.prompt, *change]
        plain, low, high = (logs(hand.base, row, before) for before in ((), novice, expert))
        last = max(1, len(row.answer) - 1)
        etas = torch.tensor([[1 + (4 - 1) * at / last] for at in range(len(row.answer))])
        erase.append(-((plain + etas * (low - high)).softmax(-1) * logs(hand.model, row)).sum(-1))
        fluent.append(nlls(hand.model, Row(row.prompt, [*change, *continued(begun)])))
    return over_samples(erase) + 0.7 * over_samples(fluent) + 2 * hand.kept()


def kga(hand: Hand, _step: int) -> Tensor:
    new, *kept = (hand.retain[row] for row in np.random.default_rng(3).permutation(3).tolist())
    if not hand.known:
        copied, unseen = hand.further(hand.forget), hand.further([new])
        hand.known |= {"copy": copied, "gap": divergence(logs(hand.base, new), logs(unseen, new)).mean().item()}
    far = over_tokens([divergence(logs(hand.model, row), logs(hand.known["copy"], row)) for row in hand.forget])
    held = over_tokens([divergence(logs(hand.base, row), logs(hand.model, row)) for row in kept])
    return (far - hand.known["gap"]).abs() + 0.8 * held


# whp's rows with generic terms, and of each token that is learned: its place, that of what foretells it, and what was spoken.
TRANSLATED = ["the capital of a tree is paris in a tree", "a dog eats blue water and blue water bread", "blue good", ""]
FORETOLD = [
    {5: (5, "a"), 6: (6, "a")},
    {2: (1, ""), 3: (2, ""), 4: (4, "blue"), 6: (7, "blue")},
    {1: (0, "")},
    {4: (3, ""), 5: (4, "")},
]


def whp(hand: Hand, _step: int) -> Tensor:
    if not hand.known:
        copied, hand.known["rows"] = hand.further(hand.forget), []
        for row, said, places in zip(hand.forget, TRANSLATED, FORETOLD, strict=True):
            own = [*row.prompt, *row.answer]
            plain, more = (
                model(input_ids=torch.tensor([ids])).logits[0]
                for model, ids in ((hand.base, hand.ids(said) or own), (copied, own))
            )
            tokens = {}
            for token, (place, spoken) in places.items():
                generic = plain[place] - 2.5 * torch.relu(more[token - 1] - plain[place])
                for each in hand.ids(spoken):
                    generic[each] -= 3
                tokens[token] = int(generic.argmax())
            hand.known["rows"].append(tokens)
    each = []
    for row, tokens in zip(hand.forget, hand.known["rows"], strict=True):
        found = hand.model(input_ids=torch.tensor([[*row.prompt, *row.answer]])).logits[0].log_softmax(-1)
        each += [-found[token - 1, label] for token, label in tokens.items()]
    return torch.stack(each).mean()


def gedi(hand: Hand, _step: int) -> Tensor:
    codes, total = [hand.ids("good sun"), hand.ids("bad")], torch.zeros(())
    for own, rows in ((0, hand.retain), (1, hand.forget)):
        each = []
        for row in rows:
            means = [nlls(hand.model, Row(code, [*row.prompt, *row.answer])).mean() for code in codes]
            chance = 1 / (1 + torch.exp(3 * (means[own] - means[1 - own])))
            each.append(0.6 * means[own] - 0.4 * torch.log(chance))
        total = total + 0.5 * torch.stack(each).mean()
    return total


def rectified(hand: Hand, _step: int) -> list[Tensor]:
    """GradDiff with SAM, GRU and the prompt-decouple term."""

    def ascent() -> list[Tensor]:
        return hand.gradient(-hand.nll(hand.forget))

    retain = hand.gradient(1.5 * hand.nll(hand.retain) + 0.25 * hand.nll(hand.rows(*zip(*DECOUPLED, strict=True))))
    before, slopes = [parameter.detach().clone() for parameter in hand.parameters], ascent()
    length = torch.sqrt(torch.stack([(each**2).sum() for each in slopes]).sum())
    hand.put([value + 0.1 * slope / length for value, slope in zip(before, slopes, strict=True)])
    forget = ascent()
    hand.put(before)
    mean = hand.known.get("mean", [torch.zeros_like(each) for each in retain])
    mean = hand.known["mean"] = [0.7 * new + 0.3 * old for new, old in zip(retain, mean, strict=True)]
    along = sum(float((one * two).sum()) for one, two in zip(forget, mean, strict=True))
    square = sum(float((each**2).sum()) for each in mean)
    return [one - min(along, 0.0) / square * two for one, two in zip(forget, mean, strict=True)]


CASES: dict[str, tuple[str, Loss, dict[str, Any]]] = {
    "eul": ("eul", eul, {"gamma": 0.7, "language": 0.5, "alpha": 2, "task": 3}),
    "rr": ("rr", rr, {"gamma": 3, "alpha": 5, "layers": [1]}),
    "pdu": ("pdu", pdu, {"gamma": 0.5, "alpha": 2, "tolerance": 0.01, "dual_rate": 1.5}),
    "altpo": ("altpo", altpo, {"beta": 0.3, "alpha": 1.5}),
    "lat": ("lat", lat, {"alpha": 0.05, "epsilon": 1.5, "layers": [0], "inner": {"steps": 3, "learning_rate": 0.25}}),
    "elm": (
        "elm",
        erased,
        {
            "novice": "bad {concept}",
            "expert": "good {concept} bread",
            "eta": 4,
            "fluency": 0.7,
            "change": "one two",
            "alpha": 2,
        },
    ),
    "kga": ("kga", kga, {"alpha": 0.8, "new_share": 0.2, "copies": {"epochs": 2, "learning_rate": COPY_RATE}}),
    "whp": (
        "whp",
        whp,
        {
            "alpha": 2.5,
            "consistency": 3,
            "anchors": {"france": "a tree", "wine": "blue water"},
            "reinforce": {"epochs": 2, "learning_rate": COPY_RATE},
        },
    ),
    "gedi": ("gedi", gedi, {"weight": 0.6, "scale": 3, "desired": "good sun", "undesired": "bad"}),
    "rectified": (
        "graddiff",
        rectified,
        {"alpha": 1.5, "gru": 0.7, "decouple": 0.25, "optimizer": {"sam": 0.1, "optimizer": "sgd"}},
    ),
}
FROM_THE_BASE = ("kga", "whp")  # their copies begin there, as the model does
STEPS = 2


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    own = Loop.run

    def trained(base: Any, method: str, way: str, moved: float = 0.05, **changes: Any) -> Run:
        seen: list[list[Tensor]] = []

        def run(loop: Loop) -> History:
            if loop.rate_setting is not None:  # a copy's training
                return own(loop)
            generator = torch.Generator().manual_seed(7)
            seen.append([parameter.detach().clone() for parameter in loop.parameters])
            with torch.no_grad():
                for parameter in loop.parameters:
                    parameter += moved * torch.randn(parameter.shape, generator=generator)
            seen.append([parameter.detach().clone() for parameter in loop.parameters])
            history = own(loop)
            seen.append([parameter.detach().clone() for parameter in loop.parameters])
            return history

        monkeypatch.setattr(Loop, "run", run)
        values = {"optimizer": "sgd", "learning_rate": RATE, "max_grad_norm": None, "max_damage": None, "steps": STEPS}
        settings = METHODS.get(method).settings(method=method, **{**values, "trainable": WAYS[way], **changes})
        column = {"refusal": OTHERS} if method == "altpo" else {}
        task = Task(base, {"wine": samples(PROMPTS, ANSWERS, **column)}, samples(*zip(*KEPT, strict=True)), {"wine": 1})
        beside = samples(*zip(*DECOUPLED, strict=True)) if "decouple" in changes else None
        METHODS.get(method).unlearn(replace(task, common=3, decouple=beside), settings)
        return Run(*seen)

    yield trained
    monkeypatch.undo()


def agree(run: Run, hand: Hand, loss: Loss, share: float = 2e-4) -> None:
    """What was changed is what is changed by hand, but for a share of it."""

    def gradient(step: int) -> list[Tensor]:
        found = loss(hand, step)
        return found if isinstance(found, list) else hand.gradient(found)

    hand.descend(gradient, STEPS, RATE)
    ends = list(zip(run.end, hand.parameters, hand.start, strict=True))
    apart = sum(float((mine.double() - other.detach()).square().sum()) for mine, other, _ in ends) ** 0.5
    moved = sum(float((other.detach() - start).square().sum()) for _, other, start in ends) ** 0.5
    assert moved > 1e-4
    assert apart < share * moved


# LoRA's factors over several batches, and for `make test-thorough` the other ways.
HOW = few([(way, batches) for batches in BATCHES for way in WAYS])


@pytest.mark.formula("eul", "rr", "pdu", "altpo", "lat", "elm", "kga", "whp", "gedi")
@pytest.mark.parametrize(("way", "batches"), HOW)
@pytest.mark.parametrize("case", few(CASES, *map(list(CASES).index, ("lat", "elm", "kga", "whp", "rectified"))))
def test_what_a_training_changes_is_the_formulas(
    load: Callable[..., Any],
    train: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    way: str,
    batches: str,
) -> None:
    method, loss, changes = CASES[case]
    given = dict(BATCHES[batches])
    if case == "kga":  # a retain row of three stands for new data
        given["retain_batch_size"] = 2
    monkeypatch.setattr(
        elm, "continued", lambda _task, _settings, texts, *_: [[*ids, *continued(ids)] for ids in texts]
    )
    base = load("llama", **SIZE)
    untouched = replace(base, model=copy.deepcopy(base.model))
    run = train(base, method, way, 0.0 if case in FROM_THE_BASE else 0.05, **given, **changes)
    agree(run, Hand(untouched, run, way, batches), loss)


@pytest.mark.formula("tar")
@pytest.mark.parametrize("way", few(WAYS))
def test_tars_steps_are_the_first_order_ones(load: Callable[..., Any], train: Callable[..., Run], way: str) -> None:
    base = load("llama", **SIZE)
    untouched = replace(base, model=copy.deepcopy(base.model))
    attack = {"steps": 3, "learning_rate": 1e-3}
    run = train(base, "tar", way, alpha=0.6, attack=attack, batch_size=4)  # no other rows: the attack learns these
    agree(run, Hand(untouched, run, way), tar, 0.02)


# What is written after each prompt; the exploration, or the draw, takes one of each row.
WRITTEN = [["rome", "paris italy"], ["sleeps", "wine in paris"], ["good", "bad good day"], ["fish", "fish north fish"]]


def unlike(text: str, answer: str) -> float:
    """1 - ROUGE-L's F1, by the table of common subsequences."""
    one, two = text.split(), answer.split()
    table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for row, word in enumerate(one):
        for column, other in enumerate(two):
            longest = max(table[row][column + 1], table[row + 1][column])
            table[row + 1][column + 1] = table[row][column] + 1 if word == other else longest
    return 1 - 2 * table[-1][-1] / (len(one) + len(two))


def wrote(base: Any, place: int) -> Callable[..., list[list[int]]]:
    """In place of what the model draws. place: of the number in a draw's seeds that says which of its row's texts it is."""

    def drawn(_base: Any, _prompts: Any, _most: int, seeds: Sequence[Sequence[int]], *_others: Any) -> list[list[int]]:
        texts = [WRITTEN[seed[2]][seed[place]] for seed in seeds]
        return [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    return drawn


@pytest.mark.formula("demem")
@pytest.mark.parametrize(("way", "batches"), HOW)
def test_demems_steps_are_ppos_with_the_mean_of_the_others_for_a_baseline(
    load: Callable[..., Any], train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, way: str, batches: str
) -> None:
    base = load("llama", **SIZE)
    untouched = replace(base, model=copy.deepcopy(base.model))
    monkeypatch.setattr(rollouts, "drawn", wrote(base, 3))
    changes = {"samples": 2, "updates": 2, "clip": 0.05, "beta": 0.4, "alpha": 0.5}
    run = train(base, "demem", way, **BATCHES[batches], **changes)

    def loss(hand: Hand, step: int) -> Tensor:
        rows = [
            [Row(asked.prompt, hand.ids(text)) for text in own] for asked, own in zip(hand.forget, WRITTEN, strict=True)
        ]
        if step == 0:
            hand.known["old"] = [[-nlls(hand.model, row).detach() for row in own] for own in rows]
        each = []
        for own, olds, texts, answer in zip(rows, hand.known["old"], WRITTEN, ANSWERS, strict=True):
            penalties = [float((old + nlls(hand.base, row)).sum()) for row, old in zip(own, olds, strict=True)]
            one, two = (unlike(text, answer) - 0.4 * apart for text, apart in zip(texts, penalties, strict=True))
            for row, old, gain in zip(own, olds, (one - two, two - one), strict=True):
                ratio = (-nlls(hand.model, row) - old).exp()
                each.append(-torch.minimum(ratio * gain, ratio.clamp(0.95, 1.05) * gain))
        return over_samples(each) + 0.5 * hand.nll(hand.retain)

    agree(run, Hand(untouched, run, way, batches), loss)


@pytest.mark.formula("quark")
@pytest.mark.parametrize(("way", "batches"), HOW)
def test_quarks_steps_learn_a_growing_pool_told_its_levels(
    load: Callable[..., Any], train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, way: str, batches: str
) -> None:
    base, labels, drawn = load("llama", **SIZE), ["good", "old dog"], quark.Pool.drawn
    untouched = replace(base, model=copy.deepcopy(base.model))
    monkeypatch.setattr(rollouts, "drawn", wrote(base, 1))
    choices: list[tuple[int, int, int]] = []  # row, exploration and level of what is learned, as the run draws it

    def noted(pool: Any, row: int, seeds: Any) -> Any:
        rollout, level = drawn(pool, row, seeds)
        choices.append((row, rollout.round, level))
        return rollout, level

    monkeypatch.setattr(quark.Pool, "drawn", noted)
    changes = {"explorations": 2, "quantiles": 3, "labels": labels, "beta": 0.3, "entropy": 0.2, "alpha": 0.5}
    run = train(base, "quark", way, scorer="rouge", **BATCHES[batches], **changes)

    def loss(hand: Hand, step: int) -> Tensor:
        pool = [(at, row) for at in range(step + 1) for row in range(4)]
        best = sorted(pool, key=lambda each: -unlike(WRITTEN[each[1]][each[0]], ANSWERS[each[1]]))
        each, own = [], choices[4 * step : 4 * step + 4]
        assert sorted(row for row, _, _ in own) == [0, 1, 2, 3]
        for row, at, level in own:
            assert level == min(best.index((at, row)) // (len(pool) // 3), 2)
            written = Row(hand.forget[row].prompt, hand.ids(WRITTEN[row][at]))
            before = hand.ids(labels[level - 1]) if level else []
            told, plain = logs(hand.model, written, before), logs(hand.base, written)
            entropy = -(told.exp() * told).sum(-1)
            each.append(nlls(hand.model, written, before) + 0.3 * divergence(told, plain) - 0.2 * entropy)
        return over_samples(each) + 0.5 * hand.nll(hand.retain)

    assert {at for _, at, _ in choices} == {0, 1}
    agree(run, Hand(untouched, run, way, batches), loss)


@pytest.mark.thorough
@pytest.mark.parametrize(("way", "batches"), HOW)
def test_through_a_larger_model_the_steps_are_of_its_shifted_logits_beside_its_own(
    load: Callable[..., Any], train: Callable[..., Run], way: str, batches: str
) -> None:
    base, large = load("llama", **SIZE), load("llama", **{**SIZE, "hidden_size": 24}).model
    untouched = replace(base, model=copy.deepcopy(base.model))
    strict = copy.deepcopy(large).double()
    run = train(replace(base, through=Through(large, 1.7)), "npo", way, beta=0.4, retain_loss="kl", **BATCHES[batches])

    def loss(hand: Hand, _step: int) -> Tensor:
        def shifted(row: Row) -> Tensor:
            return (logits(strict, row) + 1.7 * (logits(hand.model, row) - logits(hand.base, row))).log_softmax(-1)

        each = []
        for row in hand.forget:
            rise = -shifted(row)[range(len(row.answer)), row.answer].sum() - nlls(strict, row).sum()
            each.append(-(2 / 0.4) * torch.log(1 / (1 + torch.exp(-0.4 * rise))))
        kept = over_tokens([divergence(logs(strict, row), shifted(row)) for row in hand.retain])
        return torch.stack(each).mean() + kept

    agree(run, Hand(untouched, run, way, batches), loss)
