"""The names of the files of an ExecuTorch checkpoint, as ExecuTorch's Llama example reads them."""

CHECKPOINT = "consolidated.00.pth"
PARAMS = "params.json"
SETTINGS = "llm_config.yaml"
