import pytest
from accelerate.commands.config.config_args import load_config_from_file
from runs import SCRIPTS


@pytest.mark.parametrize(("name", "machines", "processes"), [("one_machine", 1, 8), ("two_machines", 2, 16)])
def test_configs_are_read_by_accelerate(name, machines, processes):
    config = load_config_from_file(str(SCRIPTS / "accelerate" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes, config.mixed_precision) == (machines, processes, "bf16")
    assert (config.main_process_ip is not None) == (machines > 1)
