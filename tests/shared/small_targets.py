"""The built-in models of `fastdp bench` at sizes that a test can train: what each name stands for."""

SMALL = {
    "mlp": "mlp:features=6,width=8",
    "cnn": "cnn:size=12",
    "lstm": "lstm:steps=5,features=3,width=4",
    "resnet50": "resnet50:size=32,classes=5",
    "xception": "xception:size=71,classes=5",
    "vit-b16": "vit-b16:size=16,patch=8,width=8,depth=1,heads=2,wide=16,classes=5",
    "bert-base": "bert-base:tokens=6,vocabulary=40,width=8,depth=1,heads=2,wide=16,positions=8",
    "gpt2-small": "gpt2-small:tokens=6,vocabulary=40,width=8,depth=1,heads=2,positions=8",
}
