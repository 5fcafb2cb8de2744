"""What is run on two hosts: the demo, shortened."""

from hosts import ROOT

PRETRAIN, CHECK = ROOT / "launcher" / "pretrain.py", ROOT / "launcher" / "check.py"
RECIPE = ROOT / "recipes" / "demo.yaml"
STEPS, RESET = 10, 4
OVERRIDES = (
    f"run.steps={STEPS}",
    "run.log_every=1",
    "run.checkpoint_every=0",
    "data.global_batch=32",
    "data.loader=torch",  # the demo's imports DALI in every process
    "data.workers=0",
    "data.large_px=24",
    "grouping.num_groups=24",
    f"grouping.reset_every={RESET}",
    "evaluation.baselines=false",
    "evaluation.num_train_images=32",
    "evaluation.num_test_images=16",
)
