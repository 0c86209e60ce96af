"""The parts of a block whose backward pass is written out."""

import torch

from oriole.model.rope import frequencies, rope_table, rotary_rows, rotate


def test_the_gradient_of_a_rotation_is_autograds() -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(2, 5, 3, 8, generator=generator) for _ in range(2))
    pos = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    cos, sin = (rotary_rows(table, pos) for table in rope_table(frequencies(8, 100.0), 16))

    def plain(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :4], x[..., 4:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    results = []
    for turn in (lambda x: rotate(x, cos, sin), plain):
        leaf = x.clone().requires_grad_()
        y = turn(leaf)
        results.append([y.detach(), *torch.autograd.grad((y * upstream).sum(), leaf)])
    torch.testing.assert_close(results[0], results[1])
