"""What a running server is asked by the tests that hold it against something."""

import httpx

from harness.engines import Target


def served_logprobs(target: Target, prompts: list[list[int]]) -> list[list[dict[int, float]]]:
    """What the server gives each token of each prompt after the first: its most likely tokens and their logprobs."""
    request = {"model": target.model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 5}
    headers = {"Authorization": f"Bearer {target.api_key}"}
    answer = httpx.post(f"{target.base_url}/v1/completions", json=request, headers=headers, timeout=300)
    answer.raise_for_status()
    return [
        [{int(token): entry["logprob"] for token, entry in place.items()} for place in choice["prompt_logprobs"][1:]]
        for choice in answer.json()["choices"]
    ]
