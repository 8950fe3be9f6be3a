"""PyTorch's side of a race: started by `python -m moe_numpy bench` where PyTorch is installed."""

import torch
from references import EXPERTS, GPT, below
from torch.nn import functional as F

from moe_numpy import machine
from moe_numpy.lab import bench_process
from moe_numpy.lab.bench_process import COMPARED_STEPS, Work, sketch


def build(spec):
    """Build the work that a specification names, by `variant` in one of several ways."""
    machine.keep_memory()  # as our side does: freed arrays are not faulted in again
    torch.set_num_threads(spec["threads"])
    works = {"product": product_work, "step": step_work, "layer": layer_work}
    return (works | {"generate": generate_work})[spec["work"]](spec)


def product_work(spec):
    """Multiply two matrices."""
    pair = []

    def take(given):
        pair[:] = (torch.as_tensor(given[name]) for name in ("a", "b"))

    def once():
        return pair[0] @ pair[1]

    return Work(None, take, lambda: {"product": once().numpy()}, once, {})


def new_model(spec):
    """Build the model of Transformers for gated experts, ours for all others."""
    config = spec["config"]
    if config["moe"] and config["moe"]["activation"] == "swiglu":
        from mixtral import Mixtral

        return Mixtral(config, spec["variant"])
    return GPT(config, spec["variant"])


def step_work(spec):
    """Train: forward, backward, clipping, AdamW. `fused` asks for AdamW's fused kernel."""
    model = new_model(spec)
    ties = model.ties()
    optimizer = new_optimizer(model, spec["training"], spec["fused"])
    batches, place = [], [0]

    def take(given):
        load(ties, given)
        tokens, targets = (torch.as_tensor(given[name]) for name in ("token", "target"))
        batches[:] = zip(tokens.long(), targets.long(), strict=True)

    def backward():
        token, target = batches[place[0] % len(batches)]
        place[0] += 1
        loss = F.cross_entropy(model(token).flatten(0, 1), target.flatten())
        loss.backward()
        return loss

    def once():
        loss = backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["training"]["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def values():
        backward()
        grads = gradients(ties)
        optimizer.zero_grad(set_to_none=True)
        place[0], named = 0, below("change", ties)
        before = {name: tie.value() for name, tie in named.items()}
        losses = torch.stack([once().detach() for _ in range(COMPARED_STEPS)])
        changes = {name: tie.value() - before[name] for name, tie in named.items()}
        return {"loss": losses.numpy(), **grads, **changes}

    return Work(None, take, values, once, {})


def new_optimizer(model, training, fused):
    """Decay the matrices and spare gains, as the package does."""
    parameters, knobs = list(model.parameters()), training["optimizer"]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": knobs["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (knobs["beta1"], knobs["beta2"])
    optimizer = torch.optim.AdamW(
        groups, lr=training["rate"], betas=betas, eps=knobs["eps"], fused=fused
    )
    if any(bool(group["fused"]) != fused for group in optimizer.param_groups):
        raise ValueError(f"torch_worker: AdamW must have fused={fused}, got another. Check it.")
    return optimizer


def layer_work(spec):
    """Run an MoE layer alone, forward and backward."""
    model = EXPERTS[spec["variant"]](spec["width"], spec["moe"])
    ties = model.ties()
    x, dy = torch.empty(0), torch.empty(0)

    def take(given):
        nonlocal x, dy
        load(ties, given)
        x = torch.tensor(given["x"], requires_grad=True)
        dy = torch.tensor(given["dy"])

    def once():
        x.grad = None
        model.zero_grad(set_to_none=True)
        y = model(x)
        y.backward(dy)
        return y

    def values():
        y = once().detach().numpy()
        return {"y": y, "dx": x.grad.numpy(), **gradients(ties)}

    return Work(None, take, values, once, {})


def generate_work(spec):
    """Let the model of Transformers write greedily."""
    model = new_model(spec).eval()
    prompt = torch.empty(0)

    def take(given):
        nonlocal prompt
        load(model.ties(), given)
        prompt = torch.as_tensor(given["prompt"])[None]

    def once():
        return model.generate(prompt, spec["tokens"])

    def values():
        written = once()
        with torch.no_grad():
            logits = model(torch.cat((prompt[0], written))[None])
        return {"written": written.numpy(), "logits": logits.numpy()}

    return Work(None, take, values, once, {})


def load(ties, given):
    """Copy the package's parameters into the model; every one must find its place."""
    named = below("params", ties)
    wanted = {name for name in given.files if name.startswith("params.")}
    if wanted != named.keys():
        odd = ", ".join(sorted(wanted ^ named.keys()))
        raise ValueError(f"torch_worker: parameters must be tied on both sides, got {odd} on one.")
    for name, tie in named.items():
        tie.load(given[name])


def gradients(ties):
    """Collect the gradients by the package's names, large ones shortened."""
    return {name: sketch(name, tie.gradient()) for name, tie in below("grads", ties).items()}


if __name__ == "__main__":
    bench_process.serve(build)
