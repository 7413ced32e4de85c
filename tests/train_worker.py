"""`advgrpo.train` with a fault: none, slow, killed, burning or misconfigured.

Started in forks (zygote.py) by test_restart.py, test_distributed.py and test_text_caches.py.

slow: rank 1 takes a second longer for every micro-batch that it samples, and one for every micro-batch that it scores.
killed: rank 1 is killed in its third iteration, but only in the first attempt of torchrun.
burning, misconfigured: rank 1 fails, with an error of the machine or of the user, where rank 0 waits for it.
"""

import os
import signal
import time

from advgrpo.adversary.feature_head import FeatureHeadAdversary
from advgrpo.errors import UserError
from advgrpo.sampling.sampler import Sampler
from advgrpo.train import main
from advgrpo.training.policy_gradient import PolicyGradient
from advgrpo.training.run import Run


def slowed(method):
    def slower(*arguments, **keywords):
        time.sleep(1.0)
        return method(*arguments, **keywords)

    return slower


def killed(rollout):
    def die(objective, table, iteration, *chosen):
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return rollout(objective, table, iteration, *chosen)

    return die


ERRORS = {"burning": OSError("the image store is on fire"), "misconfigured": UserError("seed = -1: want 0 or more")}


def failing(error):
    def prepare(run, resume):
        raise error

    return prepare


def run(arguments: list[str]) -> int:
    """[fault, *flags]: the exit code of the training."""
    fault, *flags = arguments
    if os.environ["RANK"] == "1" and fault == "slow":
        Sampler.run, FeatureHeadAdversary.features = slowed(Sampler.run), slowed(FeatureHeadAdversary.features)
    if os.environ["RANK"] == "1" and fault == "killed" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        PolicyGradient.rollout = killed(PolicyGradient.rollout)
    if os.environ["RANK"] == "1" and fault in ERRORS:
        Run._prepare = failing(ERRORS[fault])
    return main(flags)


def run_at_home(arguments: list[str]) -> int:
    """[folder, *flags]: a training whose home is folder/home0, folder/home1, by its rank, as on several machines."""
    folder, *flags = arguments
    os.environ["HOME"] = os.path.join(folder, f"home{os.environ['RANK']}")
    os.makedirs(os.environ["HOME"])
    return main(flags)
