import pytest
import torch

torch.set_num_threads(1)  # the tensors of the tests are small: more threads only wait for each other on a shared machine


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
