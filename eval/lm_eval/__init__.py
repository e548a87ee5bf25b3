"""The bridge to lm-eval (https://github.com/EleutherAI/lm-evaluation-harness): its tasks on the model in memory."""
