#!/usr/bin/env bash
# pythae 0.1.2
# Expected: VAEGAN's decoder minimizes (1 - a) L_rec - a L_D, as its loss says (a: adversarial_loss_scale, 0.5 by default), and its encoder
#           KL + L_rec (Larsen et al. 2016, algorithm 1).
# Seen: the three losses are differentiated one after the other without a stop of gradients between the parts, so that each part also gets
#       what the later losses leave in it. The decoder's gradient is that of (1 - a) L_rec + (1 - a) L_D: it helps the discriminator to tell
#       its samples from images. The encoder's is that of KL + (2 - a) L_rec.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 pythae==0.1.2 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAEGAN, VAEGANConfig
from pythae.models.nn.benchmarks.mnist import Decoder_Conv_AE_MNIST, Discriminator_Conv_MNIST, Encoder_Conv_VAE_MNIST
from pythae.trainers import CoupledOptimizerAdversarialTrainer, CoupledOptimizerAdversarialTrainerConfig

torch.manual_seed(0)
config = VAEGANConfig(input_dim=(1, 28, 28), latent_dim=16, reconstruction_layer=3)
parts = (Encoder_Conv_VAE_MNIST(config), Decoder_Conv_AE_MNIST(config), Discriminator_Conv_MNIST(config))
model = VAEGAN(config, *parts)
images = torch.rand(32, 1, 28, 28)
training = CoupledOptimizerAdversarialTrainerConfig(output_dir="out", no_cuda=True, per_device_train_batch_size=32)
trainer = CoupledOptimizerAdversarialTrainer(model, BaseDataset(images, torch.zeros(32)), training_config=training)
trainer.prepare_training()
out = model.train()({"data": images})


def gradient(loss, part):
    one_by_one = torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)
    return torch.cat([each.flatten() for each in one_by_one])


def distance(found, expected):
    return float((found - expected).norm() / found.norm())


a = model.adversarial_loss_scale
says = {"decoder": gradient(out.decoder_loss, model.decoder), "encoder": gradient(out.encoder_loss, model.encoder)}
of_rec = {name: gradient(out.recon_loss, getattr(model, name)) for name in says}
does = {
    "decoder": (1 - a) * (of_rec["decoder"] + gradient(out.discriminator_loss, model.decoder)),
    "encoder": says["encoder"] + (1 - a) * of_rec["encoder"],
}
trainer._optimizers_step(out)
for name in says:
    found = torch.cat([parameter.grad.flatten() for parameter in getattr(model, name).parameters()])
    print(f"{name}: distance to its own loss {distance(found, says[name]):.1e}, to the sum {distance(found, does[name]):.1e}")
    assert distance(found, says[name]) > 1e-2 and distance(found, does[name]) < 1e-5, "the behaviour changed"
PYTHON
