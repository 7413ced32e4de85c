"""The other commands: generate, evaluate, references, plan, export, compare, experiments, rewards.serve."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from advgrpo.runtime.checkpoint import save_checkpoint
from advgrpo.service.command import load_references, read_settings, sizes_of
from tests.bad_input.case import Bench, Case
from tests.bad_input.world import image

_DRAW, _SCORE, _SETS, _PLAN = "generate", "evaluate", "references check and generate", "plan"
_IMPORT = "references import"


def _case(group: str, command: str, base: Callable[[Bench], Sequence[str]]) -> Callable[..., Case]:
    """Maker of cases: flags, or a function of the bench that gives them, after those of a command that would work."""

    def case(
        flags: str | Sequence[str] | Callable[[Bench], Sequence[str]], *expect: str, name: str = "", **more
    ) -> Case:
        def make(bench: Bench) -> list[str]:
            before = base(bench)
            given = flags(bench) if callable(flags) else flags.split() if isinstance(flags, str) else flags
            return [*before, *given]

        return Case(
            group, name or (flags if isinstance(flags, str) else str(flags)), expect, make, command=command, **more
        )

    return case


def _drawing(bench: Bench) -> list[str]:
    return [
        "--prompt",
        "a small red star",
        "--model",
        str(bench.world.pipeline),
        "--output",
        str(bench.folder / "g.png"),
    ]


draw = _case(_DRAW, "generate", _drawing)
GENERATE = [
    draw("--prompt=", "--prompt: give at least one non-empty prompt"),
    Case(_DRAW, "no prompt", ("--prompt: give at least one",), lambda b: [], command="generate"),
    draw("--device cuda", "device='cuda' but torch sees no GPU"),
    draw("--device gpu", "--device 'gpu': want one of auto, cpu, cuda"),
    draw("--num-steps -2", "--num-steps -2: want a whole number from 0 to 1000"),
    draw("--num-steps many", "--num-steps 'many': want a whole number"),
    draw("--resolution 33", "--resolution = 33: this model wants a multiple of"),
    draw("--resolution 4096", "--resolution = 4096: this model wants", "at most"),
    draw("--guidance-scale nan", "--guidance-scale nan: not finite"),
    draw("--guidance-scale inf", "--guidance-scale inf: not finite"),
    draw("--guidance-scale 0.5", "--guidance-scale 0.5: want at least 1, or 0"),
    draw("--guidance-scale 1e9", "--guidance-scale 1e9: want a number from 0 to 100"),
    draw("--images-per-prompt 0", "--images-per-prompt 0: want a whole number from 1 to 100"),
    draw("--seed -1", "--seed -1: want a whole number"),
    draw("--model nowhere/model", "--model = 'nowhere/model' is neither a folder nor a hub model"),
    draw(lambda b: ["--model", str(b.world.backbone)], "--model = ", "model_index.json is missing", name="model is a backbone"),
    draw("--lora nowhere", "--lora = 'nowhere", "does not exist"),
    draw(lambda b: ["--lora", str(b.world.lora), "--model", "tiny"], "--lora = ", "another model's", name="LoRA of another model"),
    draw(lambda b: ["--lora", b.write("x/pytorch_lora_weights.safetensors", "x")[: -len("/pytorch_lora_weights.safetensors")]],
         "--lora = ", "cannot be read as a LoRA", name="LoRA is text"),
    draw(lambda b: ["--output", str(b.folder)], "--output", "want the name of an image file", name="output is a folder"),
    draw("--output g.xyz", "--output g.xyz: want the name of an image file"),
    draw("--output no/such/g.png", "the folder no/such does not exist"),
    draw("--output /proc/g.png", "--output /proc/g.png cannot be written"),
    draw("--outptu g.png", "unknown flag --outptu; did you mean --output?"),
    draw("--max-sequence-length 100000", "--max-sequence-length 100000: want a whole number from 0 to 512"),
]  # fmt: skip


def _scoring(bench: Bench) -> list[str]:
    data = ["--prompts", str(bench.world.folder / "held_out.txt"), "--references", str(bench.world.references)]
    where = ["--output", str(bench.folder / "scores"), "--cache-dir", str(bench.folder / "cache")]
    return ["--model", str(bench.world.pipeline), *data, *where, "--metrics", "rule"]


score = _case(_SCORE, "evaluate", _scoring)
EVALUATE = [
    score("--metrics ,", "--metrics is empty"),
    score("--metrics pickscor", "unknown metric 'pickscor'; did you mean 'pickscore'?"),
    score("--metrics saturatoin", "did you mean 'saturation'?"),
    score("--metrics aesthetic", "needs the option head"),
    score("--metric-options.rule.strickt 1", "no option 'strickt'; it has strict"),
    score("--metric-options.rule.strict maybe", "--metric-options.rule.strict = 'maybe': want true or false"),
    score("--metric-options.ocr.workers 1", "metric 'ocr', which --metrics rule lacks"),
    score("--metrics retrieval --metric-options.retrieval.top 1", "retrieval.top: the metric retrieval takes no options"),
    score("--metrics rule_accuracy --metric-options.rule_accuracy.strict 1", "rule_accuracy takes no options; leave it out"),
    score("--metric-options.rule", "want --metric-options.METRIC.OPTION VALUE"),
    score(["--metric-options.rule.strict", "[1"], "the value cannot be read"),
    score("--lora nowhere", "--lora = 'nowhere", "does not exist"),
    score(lambda b: ["--lora", str(b.world.lora), "--against", "x"], "--against = 'x", "does not exist", name="against nowhere"),
    score(lambda b: ["--lora", str(b.world.lora), "--against", str(b.world.lora)], "is --lora itself", name="against itself"),
    score("--against base", "compares the base model with itself"),
    score("--images-per-prompt 0", "--images-per-prompt 0: want a whole number from 1 to 1000"),
    score("--confidence 95", "--confidence 95: want a number above 0 and below 1"),
    score("--confidence nan", "--confidence nan"),
    score("--resamples 3", "--resamples 3: want a whole number of at least 100"),
    score("--prompts=", "--prompts is empty"),
    score("--prompts nowhere.txt", "prompt file nowhere.txt does not exist"),
    score("--metrics dino_similarity --references=", "--references is empty"),
    score("--metrics dino_similarity", "--metric-options.dino_similarity.path = 'facebook/dinov2-base' cannot be loaded"),
    score("--metrics clip", "--metric-options.clip.path = 'openai/clip-vit-large-patch14' cannot be loaded"),
    score("--num-steps -1", "--num-steps -1"),
    score("--resolution 33", "--resolution = 33"),
    score("--guidance-scale inf", "--guidance-scale inf: not finite"),
    score("--device cuda", "device='cuda' but torch sees no GPU"),
    score("--model nowhere/model", "--model = 'nowhere/model'"),
    score(lambda b: ["--output", b.write("file", "")], "--output", "is not writable", name="output is a file"),
    score("--cache-dir /proc/x", "--cache-dir /proc/x is not writable"),
    score(lambda b: ["--metrics", "pickscore", "--metric-options.pickscore.path", str(b.world.backbone)],
          "--metric-options.pickscore.path = ", "is a dinov2; want a clip", name="a DINO for PickScore"),
    score(lambda b: ["--metric-options-file", b.write("o.yaml", "rule: 3")], "rule wants a mapping of options", name="options file"),
]  # fmt: skip


def _checking(bench: Bench) -> list[str]:
    return ["check", str(bench.references())]


def _making(bench: Bench) -> list[str]:
    prompts = ["--prompts", str(bench.world.folder / "prompts.txt")]
    return [
        "generate",
        *prompts,
        "--out",
        str(bench.folder / "out"),
        "--model",
        str(bench.world.pipeline),
        "--height",
        "32",
        "--width",
        "32",
    ]


def _spoilt(file: str, content: bytes) -> Callable[[Bench], list[str]]:
    def make(bench: Bench) -> list[str]:
        (bench.folder / "references" / file).write_bytes(content)
        return []

    return make


def _smaller(bench: Bench) -> list[str]:
    image(1, (8, 8)).save(bench.folder / "references" / "0-0.png")
    return []


def _same(bench: Bench) -> list[str]:
    folder = bench.folder / "references"
    (folder / "0-1.png").write_bytes((folder / "0-0.png").read_bytes())
    return []


def _gone(bench: Bench) -> list[str]:
    (bench.folder / "references" / "0-0.png").unlink()
    return []


look = _case(_SETS, "references", _checking)
make = _case(_SETS, "references", _making)
REFERENCES = [
    Case(_SETS, "no command", ("the command is missing",), lambda b: [], command="references"),
    Case(_SETS, "chekc", ("unknown command 'chekc'; did you mean 'check'?",), lambda b: ["chekc"], command="references"),
    Case(_SETS, "check nothing", ("FOLDER is missing",), lambda b: ["check"], command="references"),
    Case(_SETS, "check nowhere", ("nowhere is no folder",), lambda b: ["check", "nowhere"], command="references"),
    look("--min-size 0", "--min-size 0: want a whole number from 1"),
    look("--sheet sheet.txt", "--sheet sheet.txt: want the name of a PNG file"),
    look("--sheet no/such/sheet.png", "the folder no/such does not exist"),
    look("--sheet-rows 0", "--sheet-rows 0: want a whole number from 1"),
    look("--prompts nowhere.txt", "prompt file nowhere.txt does not exist"),
    look(_spoilt("references.json", b"{"), "references.json", "not JSON", name="index cut"),
    look(_spoilt("references.json", b"[]"), "references.json", "holds a list", name="index a list"),
    look(_spoilt("0-0.png", b"text"), "error: unreadable files", "0-0.png", name="image is text", findings=True, code=1),
    look(_gone, "error: missing files", "0-0.png", name="image gone", findings=True, code=1),
    look(_smaller, "error: too small", "0-0.png", name="image too small", findings=True, code=1),
    look(_same, "error: duplicates", "0-0.png = 0-1.png", name="image twice", findings=True, code=1),
    look(lambda b: ["--prompts", b.write("p.txt", "a prompt without images\n")], "error: prompts without references",
         name="prompt without images", findings=True, code=1),
    make("--per-prompt 0", "--per-prompt 0: want a whole number from 1 to 100"),
    make("--per-prompt 1000", "--per-prompt 1000"),
    make("--batch-size 0", "--batch-size 0: want a whole number"),
    make("--num-steps -1", "--num-steps -1"),
    make("--guidance-scale nan", "--guidance-scale nan: not finite"),
    make("--device gpu", "--device 'gpu': want one of auto, cpu, cuda"),
    make("--device cuda", "--device cuda, but torch sees no GPU"),
    make("--shard 2/2", "--shard 2/2: want i/n with i from 0 to n-1"),
    make("--shard half", "--shard half: want i/n"),
    make("--arguments {", "--arguments '{' is not JSON"),
    make("--arguments []", "is not a JSON object"),
    make(["--arguments", '{"prompt": "x"}'], "'prompt' is set by this command"),
    make("--prompts nowhere.txt", "prompt file nowhere.txt does not exist", name="generate --prompts nowhere.txt"),
    make("--prompts", "--prompts"),
    make("--model nowhere/model", "--model nowhere/model"),
    make("--out /proc/out", "--out /proc/out"),
]  # fmt: skip


def _photos(bench: Bench) -> list[str]:
    """A folder with an image and its caption."""
    bench.write("photos/a.txt", "a red fox")
    image(1, (96, 64)).save(bench.folder / "photos" / "a.png")
    return ["import", str(bench.folder / "photos"), "--out", str(bench.folder / "out"), "--min-size", "16"]


def _with_image(image: Image.Image, name: str = "b.png", **options) -> Callable[[Bench], list[str]]:
    """A second one."""

    def add(bench: Bench) -> list[str]:
        bench.write("photos/b.txt", "a blue whale")
        image.save(bench.folder / "photos" / name, **options)
        return []

    return add


def _with_file(name: str, content: str | bytes, caption: bool = True) -> Callable[[Bench], list[str]]:
    def add(bench: Bench) -> list[str]:
        if caption:
            bench.write("photos/b.txt", "a blue whale")
        bench.write(f"photos/{name}", content)
        return []

    return add


take = _case(_IMPORT, "references", _photos)
_CANNOT = "1 of 2 images cannot be used: b.png:"
IMPORT = [
    Case(_IMPORT, "nowhere", ("nowhere is not a folder",), lambda b: ["import", "nowhere", "--out", str(b.folder / "out")], command="references"),
    Case(_IMPORT, "no images", ("holds no image",), lambda b: ["import", b.write("x/y.txt", "")[: -len("/y.txt")], "--out", str(b.folder / "out")], command="references"),
    take(_with_file("b.png", "this is no image"), _CANNOT, "no PNG, JPEG or WEBP", name="a text"),
    take(_with_file("b.png", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"), _CANNOT, "no PNG", name="a git-lfs pointer"),
    take(_with_image(Image.new("RGB", (64, 64))), _CANNOT, "is in a single colour", name="black"),
    take(_with_image(image(2, (15, 64))), _CANNOT, "is 15x64; the shorter side must have 16 pixels", name="too small"),
    take(_with_image(image(2), "b.png", format="TIFF"), _CANNOT, "no PNG", name="a TIFF"),
    take(_with_file("b.png", b"\x89PNG\r\n\x1a\n"), _CANNOT, "b.png", name="its first bytes"),
    take(_with_file("metadata.jsonl", '{"file_name": "../secret.png", "text": "x"}', caption=False), "must be a path inside", name="caption of a file outside"),
    take(_with_file("c.png", "", caption=False), "1 image (c.png) have no caption", name="no caption"),
    take(lambda b: ["--out", str(b.folder / "photos" / "out")], "--out", "must be outside of", name="out inside"),
    take(lambda b: ["--out", b.write("taken/x", "")[:-2]], "--out", "holds x, which was not imported", name="out is taken"),
    take("--out /proc/out", "--out /proc/out"),
    take("--background clear", "--background 'clear': want a colour"),
    Case(_IMPORT, "parquet nowhere", ("nowhere.parquet does not exist",), lambda b: ["import", "nowhere.parquet", "--out", str(b.folder / "out")], command="references"),
    Case(_IMPORT, "no parquet", ("p.parquet cannot be read as parquet",), lambda b: ["import", b.write("p.parquet", "x" * 99), "--out", str(b.folder / "out")], command="references"),
    Case(_IMPORT, "no tar", ("s.tar cannot be read as a tar",), lambda b: ["import", b.write("s.tar", "x" * 2000), "--out", str(b.folder / "out")], command="references"),
    Case(_IMPORT, "missing shard", ("s-1.tar does not exist",), lambda b: ["import", b.write("s-0.tar", b"")[: -len("0.tar")] + "{1..2}.tar", "--out", str(b.folder / "out")], command="references"),
    Case(_IMPORT, "unknown setting of a source", ("no setting 'spilt'; such a source has split",), lambda b: ["import", "hf:o/n:spilt=test", "--out", str(b.folder / "out")], command="references"),
    Case(_IMPORT, "hub without network", ("hf:o/n cannot be loaded",), lambda b: ["import", "hf:o/n", "--out", str(b.folder / "out")], command="references", environment={"HF_HUB_OFFLINE": "1"}),
    take("--held-out 5", "--held-out 5: want 0, or fewer than the 1 prompts"),
]  # fmt: skip

plan = _case(_PLAN, "plan", lambda b: ["--preset", "sd35m-dino-paper"])
PLAN = [
    plan("--gpu big", "--gpu big: want sizes in GB"),
    plan("--gpu inf", "--gpu inf: want sizes above 0"),
    plan("--gpu nan", "--gpu nan: want sizes above 0"),
    plan("--gpu 0", "--gpu 0: want sizes above 0"),
    plan("--gpu -24", "--gpu -24: want sizes above 0"),
    plan("--gpu 24,,80", "--gpu 24,,80: want sizes in GB"),
    plan("--gpu=", "--gpu ''", "not empty"),
    plan("--gpu auto", "--gpu auto: this machine has no CUDA device"),
    plan("--processes 0", "--processes 0: want a whole number from 1"),
    plan("--rollout.group_size 8 --update.minibatches 7", "cannot be cut into micro-batches of 8", "set rollout.prompts_per_iteration = 49"),
    plan("--update.minibatches 256 --rollout.prompts_per_iteration 60", "rollout.prompts_per_iteration = 128, or rollout.micro_batch = 4 with rollout.prompts_per_iteration = 64"),
    plan("--processes some", "--processes 'some': want a whole number"),
    plan("--preset nope", "unknown preset 'nope'"),
    plan("--model.path someone/unknown", "model.path = 'someone/unknown' is not known without a network"),
    plan("--adversary.backbone someone/unknown", "adversary.backbone = 'someone/unknown' is not known without a network"),
    plan("--rollout.micro_batch 5", "is not divisible by rollout.micro_batch = 5"),
    plan("--update.eps inf", "update.eps = inf: not finite"),
    plan("--gpus 24", "unknown flag --gpus; did you mean --gpu?"),
    plan("--model.resolution 500", "model.resolution = 500: want a multiple of 8"),
    plan("--model.resolution 504", "model.resolution = 504: this model wants a multiple of 16"),
    plan("--model.resolution 8192", "model.resolution = 8192: this model wants a multiple of 16, at most 6144"),
    plan("--model.train full", "model.train = full needs float32 weights"),
    plan("--model.attention nonsense", "model.attention = 'nonsense': want one of auto, flash3"),
    plan("--model.sequence_parallel 2 --processes 3", "model.sequence_parallel = 2 puts processes into sequence groups of 2, but there are 3", "advgrpo.plan --processes 2"),
    plan("--model.sequence_parallel 5 --processes 5", "model.sequence_parallel = 5 shares out the 24 heads", "want one of 1, 2, 3, 4, 6, 8, 12, 24"),
    plan("--rollout.dynamics ddim", "rollout.dynamics = 'ddim'"),
    plan("--adversary.image_size 500", "adversary.image_size = 500 is not a multiple of the backbone's patch size 14; use 504"),
    plan("--evaluation.backbone facebook/dinov2-base --evaluation.backbone_image_size 500", "evaluation.backbone_image_size = 500"),
]  # fmt: skip

serve = _case("rewards.serve", "rewards.serve", lambda b: ["--port", "0"])
SERVE = [
    serve("", "--reward is missing: want text"),
    serve("--reward rul", "unknown reward 'rul'; did you mean 'rule'?"),
    serve("--reward rule --port 99999", "--port 99999: want a whole number from 0 to 65535"),
    serve("--reward rule --host nowhere.invalid", "cannot listen on nowhere.invalid"),
    serve("--reward rule --device gpu", "--device 'gpu': want cpu or cuda"),
    serve("--reward rule --device cuda", "--device cuda, but torch sees no GPU"),
    serve("--reward rule --options {", "--options '{' is not JSON"),
    serve("--reward rule --options []", "is not a JSON object"),
    serve(["--reward", "rule", "--options", '{"strickt": true}'], "no option 'strickt'; it has strict"),
    serve(["--reward", "rule", "--options", '{"device": "cpu"}'], "device is no option of a reward; use --device"),
    serve(["--reward", "ocr", "--options", '{"workers": 0}'], "--options ocr.workers = 0: want a whole number"),
    serve("--reward rule --token-file nowhere", "--token-file nowhere does not exist; write the token into it"),
    serve(lambda b: ["--reward", "rule", "--token-file", b.write("token", "two words")], "want the token alone", name="token of two words"),
    serve("--reward rule --allow-hosts http://judge:80", "--allow-hosts http://judge:80: want names of this machine"),
    serve("--reward rule --max-pixels 0", "--max-pixels 0: want a whole number of at least 1"),
    serve("--reward rule --max-image-pixels 1e30", "--max-image-pixels 1e30: want a whole number"),
    serve("--reward rule --request-seconds inf", "--request-seconds inf: not finite"),
    serve("--reward rule --score-seconds 0", "--score-seconds 0: want a number from 0.1 to 86400"),
    serve("--reward rule --references x", "--references and --prompts belong together"),
]  # fmt: skip


def serving(bench: Bench) -> list[str]:
    """A discriminator that learns."""
    model = ["--adversary.backbone", str(bench.world.backbone), "--adversary.image-size", "32"]
    head = ["--adversary.num-patches", "8", "--adversary.dtype", "float32", "--min-reference-size", "16"]
    where = ["--checkpoint", str(bench.folder / "kept"), "--cache-dir", str(bench.folder / "cache"), "--port", "0"]
    return ["--adversary", "dino", "--references", str(bench.world.references), *model, *head, *where]


def _kept(change: Callable[[dict], None]) -> Callable[[Bench], list[str]]:
    """A checkpoint in its folder, of the settings that `change` has changed."""

    def make(bench: Bench) -> list[str]:
        settings, config = read_settings(serving(bench), "serve")
        state = {"settings": sizes_of(settings, config).settings(config), "service": {}}
        state["references"] = load_references(settings, config).fingerprint()
        change(state)
        save_checkpoint(bench.folder / "kept", 3, {}, state, keep=1)
        return []

    return make


def _damaged(bench: Bench) -> list[str]:
    _kept(lambda state: None)(bench)
    (bench.folder / "kept" / "iteration-000003" / "state.json").write_text("{")
    return []


learn = _case("rewards.serve --adversary", "rewards.serve", serving)
LEARN = [
    Case("rewards.serve --adversary", "no references", ("--references DIR (with references.json) or --style DIR",),
         lambda b: ["--adversary", "dino", "--checkpoint", str(b.folder / "kept")], command="rewards.serve"),
    Case("rewards.serve --adversary", "no checkpoint", ("--checkpoint is missing: want a path",),
         lambda b: ["--adversary", "dino", "--references", str(b.world.references)], command="rewards.serve"),
    learn("--adversary dno", "--adversary 'dno'", "did you mean 'dino'?"),
    learn("--adversary none", "--adversary 'none': want one of dino, siglip, pickscore"),
    learn("--reward rule", "--reward and --adversary exclude each other"),
    learn("--style photos", "--references DIR (with references.json) or --style DIR (without): give one of them"),
    learn("--references nowhere", "--references nowhere is no folder"),
    learn("--references=", "--references"),
    learn(lambda b: ["--references", b.write("r/references.json", "{}")[: -len("/references.json")]],
          "references.json has no prompt with images", name="an empty index"),
    learn(lambda b: ["--references", b.write("r/references.json", "[")[: -len("/references.json")]],
          "references.json", "not JSON", name="an index that is none"),
    learn("--min-reference-size 100", "must be at least 100"),
    learn("--fit squash", "--fit 'squash': want one of refuse, crop"),
    learn("--preset tinny", "unknown preset 'tinny'; did you mean 'tiny'?"),
    learn("--preset tiny-adv-pickscore", "--adversary dino, but preset tiny-adv-pickscore has adversary.kind = pickscore"),
    learn("--preset tiny-sft --adversary pickscore", "--adversary pickscore, but preset tiny-sft has adversary.kind = dino"),
    learn("--config nowhere.yaml", "nowhere.yaml: No such file"),
    learn(lambda b: ["--config", b.write("c.yaml", "adversary: {learning_rat: 1}")], "did you mean 'adversary.learning_rate'?", name="a key of no setting"),
    learn("--adversary.learning-rate inf", "adversary.learning_rate = inf: not finite"),
    learn("--adversary.learning-rat 1", "unknown flag --adversary.learning-rat; did you mean --adversary.learning-rate?"),
    learn("--adversary.kind dino", "unknown flag --adversary.kind"),
    learn("--rollout.group-size 4", "unknown flag --rollout.group-size"),
    learn("--adversary.reward-weights 0 0", "adversary.reward_weights = [0, 0]: nothing would be rewarded or learned"),
    learn("--adversary.schedule never", "adversary.schedule = never without adversary.warmup_iterations"),
    learn("--adversary.image-size 33", "adversary.image_size = 33 is not a multiple of the backbone's patch size"),
    learn("--adversary.backbone nowhere/model", "adversary.backbone = 'nowhere/model'"),
    learn(lambda b: ["--adversary.backbone", str(b.world.clip)], "adversary.backbone = ", "is a clip", name="a CLIP for DINO"),
    learn("--images 0", "--images 0: want a whole number"),
    learn("--batch-size 0", "--batch-size 0: want a whole number from 1 to 65536"),
    learn("--optimizer-steps 0", "--optimizer-steps 0"),
    learn("--checkpoint-every 0", "--checkpoint-every 0"),
    learn("--keep-checkpoints many", "--keep-checkpoints 'many': want a whole number"),
    learn("--seed -1", "--seed -1"),
    learn("--device cuda", "--device cuda, but torch sees no GPU"),
    learn("--token-file nowhere", "--token-file nowhere does not exist"),
    learn("--checkpoint=", "--checkpoint ''", "it is empty"),
    learn("--checkpoint /proc/kept", "--checkpoint /proc/kept is not writable"),
    learn("--cache-dir /proc/x", "--cache-dir /proc/x is not writable"),
    learn(_kept(lambda state: state["settings"].update(seed=1)), "iteration-000003: it was made with other settings (seed: 1 -> 42)", name="other settings"),
    learn(_kept(lambda state: state.update(references="")), "the references are others than it was made with", name="other references"),
    learn(_kept(lambda state: state.pop("settings")), "settings is missing in state.json", name="a checkpoint of something else"),
    learn(lambda b: ["--checkpoint", str(b.world.run / "checkpoints")], "settings is missing in state.json", "start in another folder", name="checkpoints of a run"),
    learn(_damaged, "state.json is truncated", "or remove", name="a damaged checkpoint"),
]  # fmt: skip

experiment = _case("experiments", "experiments", lambda b: [])
_HERE = ("--work", "work", "--output", "out")
EXPERIMENTS = [
    experiment("", "the command is missing: write python -m advgrpo.experiments run or report or pages"),
    experiment("run hakcing", "experiment hakcing: want all, or some of"),
    experiment(["run", "hacking", *_HERE, "--seeds"], "--seeds", "want one or more values"),
    experiment(["run", "hacking", *_HERE, "--seeds", "0", "0"], "--seeds 0 0: a seed is given twice"),
    experiment(["run", "hacking", *_HERE, "--seeds", "-1"], "--seeds [-1]"),
    experiment(["run", "hacking", *_HERE, "--iterations", "0"], "--iterations 0: want a whole number of at least 1"),
    experiment(["run", "hacking", *_HERE, "--jobs", "0"], "--jobs 0: want a whole number from 1"),
    experiment(["run", "hacking", *_HERE, "--shard", "3/2"], "--shard 3/2: want I/N"),
    experiment(["run", "hacking", *_HERE, "--guidance-scales", "1", "3"], "--guidance-scales 1 3: arms train at 2", "add it"),
    experiment(["run", "hacking", *_HERE, "--guidance-scales", "0.5"], "--guidance-scales [0.5]"),
    experiment(["run", "hacking", *_HERE, "--images-per-prompt", "1"], "--images-per-prompt 1"),
    experiment(["run", "hacking", *_HERE, "--resamples", "10"], "--resamples 10"),
    experiment(["run", "hacking", *_HERE, "--prompts", "nowhere.txt"], "nowhere.txt"),
    experiment(lambda b: ["run", "hacking", *_HERE, "--prompts", b.write("p.txt", "a red dot")], "not a caption of the tiny world: 'a red dot'", name="a prompt of another world"),
    experiment(lambda b: ["run", "hacking", *_HERE, *(f for flag in ("--prompts", "--tuning-prompts") for f in (flag, b.write("p.txt", "a large fox on blue")))], "--tuning-prompts shares 1 prompts with --prompts", name="tuning on what is reported"),
    experiment("pages --output out", "--output out: it has no results.json"),
    experiment(lambda b: ["pages", "--output", str(Path(b.write("out/results.json", "{")).parent)], "results.json: not JSON", name="damaged numbers"),
    experiment("run hacking --work /proc/w", "--work /proc/w is not writable"),
    experiment(["run", "hacking", *_HERE, "--config", "nowhere.yaml"], "config file nowhere.yaml"),
    experiment(lambda b: ["run", "hacking", *_HERE, "--config", b.write("c.yaml", "itterations: 3")],
               "unknown key 'itterations'; did you mean 'iterations'?", name="unknown key"),
]  # fmt: skip

export = _case("export", "export", lambda b: [str(b.world.lora), "--out", str(b.folder / "o.safetensors")])
EXPORT = [
    export("--push-to name", "--push-to name: want USER/NAME"),
    export("--push-to a/b/c", "--push-to a/b/c: no name of a repository"),
    export("--private", "--private says how --push-to uploads"),
    export(
        "--push-to me/x", "--push-to me/x: the hub was not reached", environment={"HF_ENDPOINT": "http://127.0.0.1:9"}
    ),
    Case(
        "export",
        "nothing asked for",
        ("--out is missing: want a file to write, or --card",),
        lambda b: [str(b.world.lora)],
        command="export",
    ),
    export("--format onnx", "--format 'onnx': want one of diffusers, comfyui, kohya"),
    export("--out o.bin", "--out o.bin: want a file name that ends in .safetensors"),
    export(lambda b: ["--out", b.write("file", "") + "/o.safetensors"], "file", name="out below a file"),
    export("another", "unexpected argument 'another'"),
    Case("export", "nowhere", ("does not exist",), lambda b: ["nowhere", "--out", "o.safetensors"], command="export"),
    Case("export", "no arguments", ("LORA is missing",), lambda b: [], command="export"),
]


def _comparing(bench: Bench) -> list[str]:
    sides = [str(bench.world.pipeline), str(bench.world.run)]
    flags = ["--prompts", str(bench.world.folder / "held_out.txt"), "--out", str(bench.folder / "out")]
    return [*sides, *flags, "--device", "cpu"]


def _with_pictures(bench: Bench, index: str) -> list[str]:
    """A third side: a folder of pictures with this index."""
    folder = bench.folder / "pictures"
    bench.write("pictures/references.json", index)
    image(0).save(folder / "a.png")
    return [str(folder)]


compare = _case("compare", "compare", _comparing)
_voted = _case("compare", "compare", lambda b: [])
COMPARE = [
    Case("compare", "no arguments", ("--prompts is missing", "--out is missing"), lambda b: [], command="compare"),
    Case("compare", "one side", ("sides: 1 given; want at least two",), lambda b: ["tiny", *_comparing(b)[2:]], command="compare"),
    compare("tiny tiny", "sides: 'tiny' is given twice"),
    compare(lambda b: [str(b.world.backbone)], "is none of what can be compared", name="a side is a backbone"),
    compare(lambda b: [b.write("x.txt", "x")], "is none of what can be compared", name="a side is a text"),
    compare("nowhere/model", "sides = 'nowhere/model' is neither a folder nor a hub model"),
    compare(lambda b: [b.write("run/config.yaml", "iterations: 3")[: -len("/config.yaml")]], "has no lora/", name="a run that has not ended"),
    compare(lambda b: [b.write("run/config.yaml", "itterations: 3")[: -len("/config.yaml")]], "unknown key 'itterations'", name="a run of other settings"),
    compare(lambda b: [str(b.world.lora), "--model", "tiny"], "another model's", name="LoRA of another model"),
    compare(lambda b: [b.write("x/pytorch_lora_weights.safetensors", "x")[: -len("/pytorch_lora_weights.safetensors")], "--model", str(b.world.pipeline)],
            "cannot be read as a LoRA", name="LoRA is text"),
    compare(lambda b: _with_pictures(b, "{}"), "references.json has 0 pictures of the prompt", name="pictures lack a prompt"),
    compare(lambda b: _with_pictures(b, json.dumps({p: ["../a.png"] for p in b.world.held_out})), "must be a path inside", name="pictures elsewhere"),
    compare(lambda b: _with_pictures(b, json.dumps({p: ["b.png"] for p in b.world.held_out})), "b.png", name="pictures that are not there"),
    compare("--names one", "--names one: want 2 different names"),
    compare("--names one one", "--names one one: want 2 different names"),
    compare("--prompts nowhere.txt", "prompt file nowhere.txt does not exist"),
    compare("--checks -1", "--checks -1: want a whole number from 0 to 100"),
    compare("--images-per-prompt 0", "--images-per-prompt 0: want a whole number"),
    compare("--encoding gif", "--encoding 'gif': want png or webp"),
    compare("--guidance-scale 0.5", "--guidance-scale 0.5: want at least 1, or 0"),
    compare("--resolution 33", "--resolution = 33: this model wants a multiple of"),
    compare("--device cuda", "device='cuda' but torch sees no GPU"),
    compare("--out /proc/out", "--out /proc/out is not writable"),
    compare("--pair-per-rater 3", "unknown flag --pair-per-rater; did you mean --pairs-per-rater?"),
    _voted("serve", "FOLDER", "missing", name="serve nothing"),
    _voted("serve nowhere", "comparison nowhere/comparison.json does not exist; make the comparison again"),
    _voted(lambda b: ["serve", b.write("c/comparison.json", "{}")[: -len("/comparison.json")]], "is not what this version writes", name="serve no comparison"),
    _voted("serve . --port 70000", "--port 70000: want a whole number from 0 to 65535"),
    _voted("report", "paths: none given", name="report nothing"),
    _voted("report nowhere", "comparison nowhere/comparison.json does not exist"),
    _voted("report nowhere --confidence 1", "--confidence 1: want a number above 0 and below 1"),
    _voted("report nowhere --resamples 5", "--resamples 5: want a whole number from 100"),
]  # fmt: skip


def _reported(file: str, content: bytes) -> Callable[[Bench], list[str]]:
    """A report of a run with a damaged file."""

    def make(bench: Bench) -> list[str]:
        run = bench.copy(bench.world.run)
        (run / file).write_bytes(content)
        return [str(run)]

    return make


def _report(name: str, *expect: str, make: Callable[[Bench], list[str]]) -> Case:
    return Case("report", name, expect, make, command="report")


REPORT = [
    _report("no arguments", "OUT is missing", make=lambda b: []),
    _report("nowhere", "OUT = 'nowhere' has no config.yaml", make=lambda b: ["nowhere"]),
    _report("two", "unexpected argument", make=lambda b: [str(b.world.run), "another"]),
    _report("damaged settings", "is not valid YAML", make=_reported("config.yaml", b"update: {")),
    _report(
        "damaged metrics", "metrics.jsonl, line 1 is not a metrics record", make=_reported("metrics.jsonl", b"{\n")
    ),
    _report(
        "damaged evaluations",
        "evaluations.jsonl, line 1 is no evaluation",
        make=_reported("evaluations.jsonl", b"[]\n"),
    ),
    _report("damaged summary", "summary.json cannot be read", make=_reported("summary.json", b"[1]")),
    _report("band of nothing", "RUNS is missing", make=lambda b: ["band", "--preset", "tiny", "--out", "o.json"]),
    _report(
        "band without a preset", "--preset is missing", make=lambda b: ["band", str(b.world.run), "--out", "o.json"]
    ),
    _report(
        "band of one run",
        "RUN names 1 of the 2 runs that a band needs",
        make=lambda b: ["band", str(b.world.run), "--preset", "tiny", "--out", "o.json"],
    ),
    _report(
        "band of no preset",
        "unknown preset 'tine'; did you mean",
        make=lambda b: ["band", str(b.world.run), str(b.world.run), "--preset", "tine", "--out", "o.json"],
    ),
    _report(
        "band of another method",
        "is not of the preset 'tiny': model.path =",
        make=lambda b: ["band", str(b.world.run), str(b.world.run), "--preset", "tiny", "--out", "o.json"],
    ),
]

CASES = [*GENERATE, *EVALUATE, *REFERENCES, *IMPORT, *PLAN, *SERVE, *LEARN, *EXPERIMENTS, *EXPORT, *COMPARE, *REPORT]
