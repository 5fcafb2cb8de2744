"""What a run's folder holds, by name."""

RECIPE_FILE = "recipe.yaml"  # with all that was derived
DATASET_FILE = "dataset.json"  # the hash of what is trained on
CHECKPOINTS_FOLDER = "checkpoints"
METRICS_FILE = "metrics.jsonl"  # a line a logged step; of evaluations too, in folders of their own
STARTS_FILE = "starts.jsonl"  # where and when the run began and went on
BOARD_FOLDER = "tensorboard"
RESULTS_FILE = "results.json"  # of the run's end; of evaluations too
CURVES_FILE = "curves.png"
GROUPS_PICTURE = "groups.png"
GALLERY_FILE = "gallery.json"  # images of the groups, for the report
