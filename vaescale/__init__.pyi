"""Types of what `vaescale/__init__.py` imports when it is first used."""

from vaescale.commands.average import average as average
from vaescale.commands.baselines import baselines as baselines
from vaescale.commands.chaos import chaos as chaos
from vaescale.commands.compare_runs import compare_runs as compare_runs
from vaescale.commands.compress import compress as compress
from vaescale.commands.decompress import decompress as decompress
from vaescale.commands.doctor import doctor as doctor
from vaescale.commands.encode import encode as encode
from vaescale.commands.evaluate import evaluate as evaluate
from vaescale.commands.export import export as export
from vaescale.commands.fit_gmm import fit_gmm as fit_gmm
from vaescale.commands.fit_prior import fit_prior as fit_prior
from vaescale.commands.import_autoencoder import import_autoencoder as import_autoencoder
from vaescale.commands.latents import latents as latents
from vaescale.commands.make_shards import make_shards as make_shards
from vaescale.commands.new_recipe import new_recipe as new_recipe
from vaescale.commands.quality import quality as quality
from vaescale.commands.quickstart import quickstart as quickstart
from vaescale.commands.register import register as register
from vaescale.commands.register import register_metric as register_metric
from vaescale.commands.register import register_source as register_source
from vaescale.commands.run import Run as Run
from vaescale.commands.run import load as load
from vaescale.commands.sample import sample as sample
from vaescale.commands.score import score as score
from vaescale.commands.sweep import sweep as sweep
from vaescale.commands.sync import sync as sync
from vaescale.commands.train_features import train_features as train_features
from vaescale.commands.train_recipe import train_recipe
from vaescale.commands.verify_shards import verify_shards as verify_shards
from vaescale.data.given_images import pictures as pictures
from vaescale.errors import UserError as UserError

__version__: str
train = train_recipe
