"""A search's study, which Optuna keeps in a journal: what was tried, and what is tried next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spunge.data.split import seed_for
from spunge.errors import RecipeError
from spunge.recipe.ranges import Among, Between, Searched
from spunge.results import Wanted
from spunge.run.searching import JOURNAL

if TYPE_CHECKING:
    import optuna

BEGUN = "begun"  # of a trial: how many were over when it was drawn


def require_optuna() -> None:
    """Raises RecipeError where Optuna is not installed."""
    try:
        import optuna
    except ImportError:
        raise RecipeError("tune: needs Optuna; pip install 'spunge[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class NoLock:
    """Of the journal: the search's folder has a lock of its own, and a file beside it is one more that a disk may refuse."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def study_in(folder: Path, good: Sequence[Wanted]) -> "optuna.Study":
    """The study in a search's folder, whose journal is whole.

    good: which way is, of each objective.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.study import StudyDirection

    file = folder / JOURNAL
    lock: Any = NoLock()  # Optuna names no type for it
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(file), lock_obj=lock))
    # Of what should be near a target its distance is told.
    way = {"up": StudyDirection.MAXIMIZE, "down": StudyDirection.MINIMIZE, "near": StudyDirection.MINIMIZE}
    return optuna.create_study(
        storage=storage,
        study_name="tune",
        directions=[way[each] for each in good],
        load_if_exists=True,
    )


def state_of(name: str) -> "optuna.trial.TrialState":
    from optuna.trial import TrialState

    return TrialState[name]


class Drawn(NamedTuple):
    """A trial, and what was drawn for each setting."""

    number: int
    params: Mapping[str, Any]


def drawn_together(
    searched: Sequence[Searched], study: "optuna.Study", seed: int, count: int, wanted: int
) -> list[Drawn]:
    """The trials that are made next, at once: those that were under way when their process ended, and those still to be drawn.

    count: of the trials that are over; wanted: how many there are to be at once. What is drawn depends on these, on the search's
    seed and on the trials that are over, not on where the search was stopped.
    """
    under_way = _under_way(searched, study)
    # Where some of those that were drawn together are over, all were drawn; others would know of these what they did not.
    whole = any(trial.user_attrs.get(BEGUN, count) < count for trial in under_way)
    drawn = [Drawn(trial.number, trial.params) for trial in under_way]
    while len(drawn) < wanted and not whole:
        drawn.append(_asked(searched, study, seed, count, len(drawn)))
    return drawn[:wanted]


def _under_way(searched: Sequence[Searched], study: "optuna.Study") -> "list[optuna.trial.FrozenTrial]":
    """Trials that were not made to the end; of one whose values were not all drawn nothing was made."""
    whole = []
    for trial in study.get_trials(deepcopy=False, states=(state_of("RUNNING"),)):
        if trial.params.keys() == {setting.name for setting in searched}:
            whole.append(trial)
        else:
            study.tell(trial.number, state=state_of("FAIL"))
    return whole


def _asked(searched: Sequence[Searched], study: "optuna.Study", seed: int, count: int, beside: int) -> Drawn:
    """The next trial, beside so many others whose scores are not known: it is drawn away from these."""
    import optuna

    study.sampler = optuna.samplers.TPESampler(
        seed=seed_for(seed, "trial", str(count + beside)) % (1 << 32), constant_liar=beside > 0
    )
    trial = study.ask({setting.name: _distribution(setting.range) for setting in searched})
    trial.set_user_attr(BEGUN, count)
    return Drawn(trial.number, trial.params)


def _distribution(drawn: Between | Among) -> "optuna.distributions.BaseDistribution":
    """A choice is drawn by its place: it may be a list, which Optuna does not keep."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(drawn, Among):
        return CategoricalDistribution(list(range(len(drawn.choices))))
    if drawn.whole:
        return IntDistribution(int(drawn.low), int(drawn.high), log=drawn.log)
    return FloatDistribution(drawn.low, drawn.high, log=drawn.log)
