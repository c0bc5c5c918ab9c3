"""training.compile where the compiler of torch has nothing to compile with."""

import pytest
import torch
from torch import Tensor, nn

from vaescale.errors import UserError
from vaescale.training.launch import compiling


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x) * 2


@pytest.mark.filterwarnings("ignore")  # torch's compiler imports deprecated names
def test_a_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    model = Twice()
    model.compile()
    settings = {"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}
    with (
        inductor.patch(settings),
        pytest.raises(UserError, match=r"no-such-compiler'\)\); install what is missing \(a C\+\+ compiler"),
        compiling(),
    ):
        model(torch.ones(64, 64))
