"""What is minimized: per-example Terms in, one number out. The objective alone reduces over the batch.

To add one, write its file, add a line to OBJECTIVES and write a recipe. The contract, a class built from (config, model):

    importance_samples, doubly_reparameterized      what the model's forward is asked for
    __call__(terms, stream) -> [], {name: []}       a rank's share of the loss in nats per image, and pieces of it that the
                                                    terms' own metrics do not show, logged as train/NAME
    progress(step) -> {name: value}                 what changes over training, logged as train/NAME
"""

from typing import TYPE_CHECKING, Any

from vaescale.config import Config, one_of
from vaescale.models.vae import VAE
from vaescale.objectives.elbo import Elbo, ElboConfig
from vaescale.objectives.iwae import Iwae, IwaeConfig

# kind -> (its recipe section, its class)
OBJECTIVES: dict[str, tuple[type[Config], Any]] = {"elbo": (ElboConfig, Elbo), "iwae": (IwaeConfig, Iwae)}
Objective = Elbo | Iwae

if TYPE_CHECKING:
    ObjectiveConfig = ElboConfig | IwaeConfig
else:
    ObjectiveConfig = one_of((config for config, _ in OBJECTIVES.values()), default="elbo")


def build_objective(config: ObjectiveConfig, model: VAE) -> Objective:
    """The loss that the recipe's section says."""
    objective: Objective = OBJECTIVES[config.kind][1](config, model)
    return objective
