"""In place of Hugging Face's `datasets`, which `sglang.benchmark` imports for a data set that is not used here."""


def load_dataset(*_, **__):
    raise RuntimeError("no data set can be fetched here")
