"""The documented commands of README's table of systems, row by row, as a user types them.

`{tmp}` is an empty folder, `{run}` a run of DINO with a small ViT, `{classifier}` one of supervised training, `{images}`, `{val}`
labelled folders, `{mixed}` a set with images/, masks/ and classes.txt. SHORT is added to each `selfsup train`. Rows that need
more than a command line of one process (SLURM, torchrun, checkpoints of others) are marked at the tests that have it.
"""

SHORT = ["steps=2", "workers=0", "threads=1", "tensorboard=false", "report=false", "pictures=false", "log_every=1"]

LABELS = "train supervised_demo data={images} data.val={val} global_batch=16 --out {tmp}/"
DINO = "train demo data={images} global_batch=16 views.local.count=1 method.out_dim=64 --out {tmp}/"

COMMANDS: dict[str, list[str]] = {
    "Self-training on pseudo-labels": [
        "train distill_demo data={unlabelled} method.losses='{{hard: 1.0, ce: 0}}' global_batch=16 --out {tmp}/pseudo",
    ],
    "Distillation from a frozen SSL teacher (features, CLS and patches, DINO prototypes)": [
        f"train distill_demo data={{unlabelled}} teacher={{run}} global_batch=16 {loss} --out {{tmp}}/{name}"
        for name, loss in (
            ("cls", "method.losses='{{cls_cosine: 1.0, ce: 0, soft: 0}}'"),
            ("patches", "method.losses='{{patch_cosine: 1.0, ce: 0, soft: 0}}'"),
            ("prototypes", "method.losses='{{prototypes: 1.0, ce: 0, soft: 0}}'"),
        )
    ],
    "Learning rate × batch / 256": [LABELS + "a optimizer.lr=null optimizer.base_lr=0.004 global_batch=32"],
    "Gradual and constant warm-up; cosine, linear, constant and step schedules; linear cool-down (to zero: `min_lr=0`)": [
        LABELS + "cosine optimizer.schedule=cosine optimizer.warmup='1 steps' optimizer.warmup_kind=gradual",
        LABELS + "linear optimizer.schedule=linear optimizer.warmup='1 steps' optimizer.warmup_kind=constant",
        LABELS + "constant optimizer.schedule=constant optimizer.cooldown='1 steps' optimizer.min_lr=0",
        LABELS + "step optimizer.schedule=step optimizer.milestones='[50%]'",
    ],
    'AdamW, Adam, SGD (Nesterov), LARS, LAMB, Adafactor (the variant of "Scaling Vision Transformers"), AdaBound': [
        LABELS + f"{name} optimizer={name}" for name in ("adamw", "lars", "lamb", "adafactor", "adabound")
    ]
    + [
        LABELS + "adam optimizer=adamw optimizer.decoupled=false",
        LABELS + "sgd optimizer=sgd optimizer.nesterov=true",
    ],
    "L1, L2 and decoupled decay; separate decay for head and trunk; none for biases and norms": [
        LABELS + "l1 optimizer.l1=0.0001 optimizer.weight_decay=0.05 optimizer.head_weight_decay=0.01",
        LABELS + "l2 optimizer=sgd optimizer.decoupled=false optimizer.decay_all=true",
    ],
    "Clipping per parameter or global, layer-wise decay": [
        LABELS + "per optimizer.clip=1.0 optimizer.clip_mode=parameter",
        LABELS + "global optimizer.clip=1.0 optimizer.clip_mode=global optimizer.layer_decay=0.7",
    ],
    "Early stopping": [
        LABELS + "stop eval.every=1 early_stop.patience=1 early_stop.metric=top1",
    ],
    "Xavier init; zero gamma in residual branches": [
        LABELS + "xavier backbone.init=xavier backbone.zero_init_last=false",
    ],
    "Dropout and stochastic depth, keyed by sample": [
        "train deit_tiny_demo teacher={classifier} data={images} data.val={val} global_batch=16"
        " backbone.drop_rate=0.1 backbone.drop_path_rate=0.1 --out {tmp}/drop",
    ],
    "Weight EMA; mean teacher": [LABELS + "ema method.ema=0.99 method.consistency=1.0 views.global.count=2"],
    "bf16, fp16 with a scaler, fp32, fp64": [LABELS + f"{kind} precision={kind}" for kind in ("bf16", "fp32", "fp64")],
    "Large batch: accumulation, torchrun on several processes": [LABELS + "accumulated accumulate=2"],
    "Batch norm in backbones": [LABELS + "bn backbone.norm_layer=batchnorm2d"],
    "mixup, CutMix, either by chance, RICAP; partners do not depend on ranks or accumulation": [
        LABELS + f"{mix} mix={mix}" for mix in ("mixup", "cutmix", "mixup+cutmix", "ricap")
    ],
    "AutoAugment (ImageNet's, CIFAR's, SVHN's), RandAugment, TrivialAugment, for 1 and 3 channels": [
        LABELS + f"{policy} views.global.policy={policy}" for policy in ("randaugment", "trivialaugment")
    ]
    + [
        LABELS + f"{table} views.global.policy=autoaugment views.global.policy_table={table}"
        for table in ("imagenet", "cifar10", "svhn")
    ]
    + [
        LABELS
        + "colour views.global.policy=randaugment backbone.in_chans=3 data.mean=[0.3,0.3,0.3] data.std=[0.3,0.3,0.3]"
    ],
    "Random erasing (zero, noise, the crop's mean), Cutout": [
        LABELS + f"{fill} views.global.erase=0.5 views.global.erase_fill={fill}" for fill in ("zero", "noise", "mean")
    ]
    + [LABELS + "cutout views.global.cutout=8"],
    "Label smoothing, to all classes or to the others": [
        LABELS + f"{form} method.label_smoothing=0.1 method.smoothing_form={form}" for form in ("all", "others")
    ],
    "Resized crop, flips, colour jitter, grey, blur, solarize, per kind of view": [
        DINO
        + "views views.global.scale=[0.4,1.0] views.global.hflip=0.5 views.local.jitter=0.8 views.local.solarize=0.2",
    ],
    "PCA colour noise": [
        DINO + "pca views.global.lighting=0.1 backbone.in_chans=3 data.mean=[0.3,0.3,0.3] data.std=[0.3,0.3,0.3]",
    ],
    "Weighted k-NN (DINO's vote)": ["eval knn {run} --out {tmp}/knn.json"],
    "Linear probe": ["eval linear {run} epochs=2 --out {tmp}/linear.json"],
    "Attention heads, PCA of patch features, t-SNE, neighbours, augmentations, as pictures": [
        "eval attention {run} --out {tmp}/attention.png",
        "eval pca {run} --out {tmp}/pca.png",
        "eval tsne {run} --out {tmp}/tsne.png",
        "eval neighbors {run} --out {tmp}/neighbors.png",
        "eval augmentations demo --out {tmp}/augmentations.png",
    ],
    "Fine-tuning; top-1, top-5, per class, calibration error, confusion matrix": [
        "eval finetune {run} steps=2 global_batch=16 --out {tmp}/finetune.json",
        "eval classify {classifier} --out {tmp}/classify.json",
    ],
    "Few-shot, retrieval, near-duplicates, robustness and calibration under corruptions, a probe on each layer": [
        "eval fewshot {run} --out {tmp}/fewshot.json",
        "eval retrieval {run} --out {tmp}/retrieval.json",
        "eval duplicates {run} data={images} --out {tmp}/duplicates.json",
        "eval robustness {run} --out {tmp}/robustness.json",
        "eval robustness {classifier} by=classifier --out {tmp}/calibration.json",
        "eval layers {run} --out {tmp}/layers.json",
    ],
    "Segmentation without training: nearest patches, objects from attention, TokenCut and LOST, propagation through video": [
        "eval segment-knn {run} data={mixed}/images masks={mixed}/masks --out {tmp}/segment-knn.json",
        "eval propagate {run} data={mixed}/images masks={mixed}/masks --out {tmp}/propagate.json",
    ]
    + [
        f"eval objects {{run}} data={{mixed}}/images by={by} --out {{tmp}}/{by}.json"
        for by in ("tokencut", "lost", "attention")
    ],
    "Semantic segmentation: linear, multi-layer, SegFormer's MLP, UPerNet and UNETR heads, frozen or fine-tuned": [
        f"eval segment {{run}} data={{mixed}}/images masks={{mixed}}/masks head={head} steps=2 size=28 --out {{tmp}}/{head}.json"
        for head in ("linear", "multilayer", "mlp", "upernet", "unetr")
    ]
    + [
        "eval segment {run} data={mixed}/images masks={mixed}/masks trunk=finetune steps=2 size=28 --out {tmp}/finetuned.json"
    ],
    "Advice: a look at a data set and a proposed recipe; whether a run is well": ["doctor {images}", "health {run}"],
    "HTML report of a run, or of several compared": [
        "report {run} --out {tmp}/one.html",
        "report {run} {classifier} --out {tmp}/two.html",
    ],
}
"""First cell of a row -> its commands, without the leading `selfsup`."""
