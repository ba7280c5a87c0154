"""PyTorch's side of `make bench-model` and `make bench-train`: the same computations with the same weights, driven line by
line over stdin.

Plain torch functions instead of diffusers' and transformers' modules: fewer Python calls, so a stronger opponent, and no
package but torch is needed. With `diffusers` as argument the DiT is that library's transformer, which is what people train.
Parameter names are those of the reference libraries. The Rust side compares outputs and gradients with its own before it
believes a time.

Each line in is a JSON object with a "command": load, check, time or quit. Each line out answers one.
"""

import json
import math
import struct
import sys
import time

import torch
import torch.nn.functional as F

EPS = 1e-6
DTYPES = {"F32": torch.float32, "I64": torch.int64}


def read_tensors(path):
    """Reads a safetensors file."""
    with open(path, "rb") as file:
        data = file.read()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, info in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        body = bytearray(data[8 + length + begin : 8 + length + end])
        tensors[name] = torch.frombuffer(body, dtype=DTYPES[info["dtype"]]).reshape(info["shape"]).clone()
    return tensors


def write_tensors(path, tensors):
    """Writes f32 tensors as a safetensors file."""
    header, bodies, offset = {}, [], 0
    for name, tensor in tensors.items():
        body = tensor.detach().float().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + len(body)]}
        bodies.append(body)
        offset += len(body)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(bodies)


# --- parts -----------------------------------------------------------------------------------------------------------


def attention_part(c, q, k, v):
    b, h, kv, l, d = c["b"], c["h"], c["kv"], c["l"], c["d"]
    q, k, v = (x.view(b, l, n, d).transpose(1, 2) for x, n in ((q, h), (k, kv), (v, kv)))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=c["causal"], enable_gqa=h != kv)
    return y.transpose(1, 2).reshape(b, l, h * d)


def linear_part(c, x, w, b):
    return F.linear(x.view(c["rows"], c["inputs"]), w.view(c["outputs"], c["inputs"]), b)


def conv_part(c, x, w, b):
    x = x.view(c["b"], c["inputs"], c["side"], c["side"])
    w = w.view(c["outputs"], c["inputs"], c["kernel"], c["kernel"])
    return F.conv2d(x, w, b, stride=c["stride"], padding=c["kernel"] // 2)


def adaptive_norm(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def adaptive_norm_part(c, x, scale, shift):
    return adaptive_norm(x.view(c["b"], c["n"], c["d"]), scale.view(c["b"], c["d"]), shift.view(c["b"], c["d"]))


def rms_norm_part(c, x, w):
    return F.rms_norm(x.view(c["rows"], c["d"]), (c["d"],), w, EPS)


def group_norm_silu_part(c, x, w, b):
    return F.silu(F.group_norm(x.view(c["b"], c["channels"], c["side"], c["side"]), c["groups"], w, b, EPS))


def softmax_part(c, x):
    return torch.softmax(x.view(c["rows"], c["d"]), -1)


PARTS = {
    "attention": attention_part,
    "linear": linear_part,
    "convolution": conv_part,
    "adaptive norm": adaptive_norm_part,
    "rms norm": rms_norm_part,
    "group norm, silu": group_norm_silu_part,
    "gelu": lambda c, x: F.gelu(x, approximate="tanh"),
    "silu": lambda c, x: F.silu(x),
    "softmax": softmax_part,
}


# --- whole models: each returns (what the forward gives, the loss) -------------------------------------------------------


def linear(p, name, x):
    return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))


def sinusoid(t):
    freqs = torch.exp(-math.log(10000.0) / 128 * torch.arange(128, dtype=torch.float32))
    angles = t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


def mlp(p, name, x):
    return linear(p, name + ".linear_2", F.silu(linear(p, name + ".linear_1", x)))


def heads(p, name, norm, x, d):
    x = linear(p, name, x).view(x.shape[0], x.shape[1], -1, d).transpose(1, 2)
    return x if norm is None else F.rms_norm(x, (d,), p[norm + ".weight"], EPS)


def join_heads(x):
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def image_attention(p, at, x, d):
    q = heads(p, at + "to_q", at + "norm_q", x, d)
    k = heads(p, at + "to_k", at + "norm_k", x, d)
    y = F.scaled_dot_product_attention(q, k, heads(p, at + "to_v", None, x, d))
    return linear(p, at + "to_out.0", join_heads(y))


def feed_forward(p, at, x):
    return linear(p, at + "net.2", F.gelu(linear(p, at + "net.0.proj", x), approximate="tanh"))


def joint_block(p, at, x, c, temb, d):
    n, is_last = x.shape[1], at + "ff_context.net.2.weight" not in p
    parts = linear(p, at + "norm1.linear", temb).chunk(9 if at + "attn2.to_q.weight" in p else 6, 1)
    c_parts = linear(p, at + "norm1_context.linear", temb).chunk(2 if is_last else 6, 1)
    x_in = adaptive_norm(x, parts[1], parts[0])
    c_in = adaptive_norm(c, c_parts[0], c_parts[1]) if is_last else adaptive_norm(c, c_parts[1], c_parts[0])
    a = at + "attn."
    q = heads(p, a + "to_q", a + "norm_q", x_in, d)
    if not is_last:
        q = torch.cat([q, heads(p, a + "add_q_proj", a + "norm_added_q", c_in, d)], 2)
    k_c = heads(p, a + "add_k_proj", a + "norm_added_k", c_in, d)
    k = torch.cat([heads(p, a + "to_k", a + "norm_k", x_in, d), k_c], 2)
    v = torch.cat([heads(p, a + "to_v", None, x_in, d), heads(p, a + "add_v_proj", None, c_in, d)], 2)
    y = join_heads(F.scaled_dot_product_attention(q, k, v))
    out = x + parts[2][:, None] * linear(p, a + "to_out.0", y[:, :n])
    if len(parts) == 9:
        second = image_attention(p, at + "attn2.", adaptive_norm(x, parts[7], parts[6]), d)
        out = out + parts[8][:, None] * second
    out = out + parts[5][:, None] * feed_forward(p, at + "ff.", adaptive_norm(out, parts[4], parts[3]))
    if is_last:
        return out, c
    c = c + c_parts[2][:, None] * linear(p, a + "to_add_out", y[:, n:])
    return out, c + c_parts[5][:, None] * feed_forward(p, at + "ff_context.", adaptive_norm(c, c_parts[4], c_parts[3]))


def dit(config, p, inputs):
    latents, d, patch = inputs["latents"], config["attention_head_dim"], config["patch_size"]
    b, channels, height, width = latents.shape
    rows, columns = height // patch, width // patch
    side = config["pos_embed_max_size"]
    top, left = (side - rows) // 2, (side - columns) // 2
    table = p["pos_embed.pos_embed"].view(side, side, -1)[top : top + rows, left : left + columns]
    x = F.conv2d(latents, p["pos_embed.proj.weight"], p["pos_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + table.reshape(1, rows * columns, -1)
    temb = mlp(p, "time_text_embed.timestep_embedder", sinusoid(inputs["timestep"]))
    temb = F.silu(temb + mlp(p, "time_text_embed.text_embedder", inputs["pooled"]))
    c = linear(p, "context_embedder", inputs["text"])
    for i in range(config["num_layers"]):
        x, c = joint_block(p, f"transformer_blocks.{i}.", x, c, temb, d)
    scale, shift = linear(p, "norm_out.linear", temb).chunk(2, 1)
    x = linear(p, "proj_out", adaptive_norm(x, scale, shift))
    x = x.view(b, rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4).reshape(b, channels, height, width)
    return x, F.mse_loss(x, inputs["target"])


def conv(p, name, x, stride=1, padding=1):
    return F.conv2d(x, p[name + ".weight"], p[name + ".bias"], stride=stride, padding=padding)


def norm(p, name, x, groups):
    return F.group_norm(x, groups, p[name + ".weight"], p[name + ".bias"], EPS)


def resnet(p, at, x, g):
    y = conv(p, at + "conv1", F.silu(norm(p, at + "norm1", x, g)))
    y = conv(p, at + "conv2", F.silu(norm(p, at + "norm2", y, g)))
    return y + (conv(p, at + "conv_shortcut", x, padding=0) if at + "conv_shortcut.weight" in p else x)


def resnets(p, at, x, g):
    i = 0
    while f"{at}resnets.{i}.conv1.weight" in p:
        x, i = resnet(p, f"{at}resnets.{i}.", x, g), i + 1
    return x


def mid_block(p, at, x, g):
    x = resnet(p, at + "resnets.0.", x, g)
    a = at + "attentions.0."
    b, c, h, w = x.shape
    y = norm(p, a + "group_norm", x, g).view(b, c, h * w).transpose(1, 2)
    q, k, v = (linear(p, a + name, y)[:, None] for name in ("to_q", "to_k", "to_v"))
    y = linear(p, a + "to_out.0", F.scaled_dot_product_attention(q, k, v)[:, 0])
    return resnet(p, at + "resnets.1.", x + y.transpose(1, 2).reshape(b, c, h, w), g)


def vae(config, p, inputs):
    pixels, g, levels = inputs["pixels"], config["norm_num_groups"], len(config["block_out_channels"])
    x = conv(p, "encoder.conv_in", pixels)
    for i in range(levels):
        x = resnets(p, f"encoder.down_blocks.{i}.", x, g)
        if i + 1 < levels:
            x = conv(p, f"encoder.down_blocks.{i}.downsamplers.0.conv", F.pad(x, (0, 1, 0, 1)), 2, 0)
    x = mid_block(p, "encoder.mid_block.", x, g)
    x = conv(p, "encoder.conv_out", F.silu(norm(p, "encoder.conv_norm_out", x, g)))
    mean, logvar = x.chunk(2, 1)
    logvar = logvar.clamp(-30.0, 20.0)
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum((1, 2, 3)).mean()
    x = conv(p, "decoder.conv_in", mean + (0.5 * logvar).exp() * inputs["noise"])
    x = mid_block(p, "decoder.mid_block.", x, g)
    for i in range(levels):
        x = resnets(p, f"decoder.up_blocks.{i}.", x, g)
        if i + 1 < levels:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = conv(p, f"decoder.up_blocks.{i}.upsamplers.0.conv", x)
    x = conv(p, "decoder.conv_out", F.silu(norm(p, "decoder.conv_norm_out", x, g)))
    return x, F.mse_loss(x, pixels) + kl


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def decoder(config, p, inputs):
    x, eps = inputs["embeds"], config["rms_norm_eps"]
    b, l, width = x.shape
    h, kv = config["num_attention_heads"], config["num_key_value_heads"]
    d = width // h
    freqs = config["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = torch.outer(torch.arange(l, dtype=torch.float32), freqs.float())
    cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}."
        y = F.rms_norm(x, (width,), p[at + "input_layernorm.weight"], eps)
        q, k, v = (
            linear(p, f"{at}self_attn.{name}_proj", y).view(b, l, n, d).transpose(1, 2)
            for name, n in (("q", h), ("k", kv), ("v", kv))
        )
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + linear(p, at + "self_attn.o_proj", join_heads(y))
        y = F.rms_norm(x, (width,), p[at + "post_attention_layernorm.weight"], eps)
        y = F.silu(linear(p, at + "mlp.gate_proj", y)) * linear(p, at + "mlp.up_proj", y)
        x = x + linear(p, at + "mlp.down_proj", y)
    x = F.rms_norm(x, (width,), p["norm.weight"], eps)
    logits = F.linear(x, p["embed_tokens.weight"])
    return logits, F.cross_entropy(logits.view(b * l, -1), inputs["targets"].long().flatten())


def diffusers_dit(c, p):
    """Returns diffusers' transformer with these weights as a function of its inputs, and its parameters."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=c["sample_size"],
        patch_size=c["patch_size"],
        in_channels=c["in_channels"],
        out_channels=c["in_channels"],
        num_layers=c["num_layers"],
        attention_head_dim=c["attention_head_dim"],
        num_attention_heads=c["num_attention_heads"],
        joint_attention_dim=c["joint_attention_dim"],
        caption_projection_dim=c["attention_head_dim"] * c["num_attention_heads"],
        pooled_projection_dim=c["pooled_projection_dim"],
        pos_embed_max_size=c["pos_embed_max_size"],
        dual_attention_layers=tuple(range(c["num_dual_attention_layers"])),
        qk_norm="rms_norm",
    )
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    model.load_state_dict({name: value.reshape(shapes[name]) for name, value in p.items()})

    def run(_, inputs):
        x = model(
            hidden_states=inputs["latents"],
            encoder_hidden_states=inputs["text"],
            pooled_projections=inputs["pooled"],
            timestep=inputs["timestep"],
        ).sample
        return x, F.mse_loss(x, inputs["target"])

    return run, dict(model.named_parameters())


WHOLE = {"dit": dit, "vae": vae, "decoder": decoder}


# --- one loaded case -----------------------------------------------------------------------------------------------------


class Part:
    """A function of a few tensors: forward, and forward with the gradient of its sum."""

    def __init__(self, kind, config, tensors):
        self.f = lambda inputs: PARTS[kind](config, *inputs)
        self.weight = tensors.pop("output_weight")
        self.inputs = [tensors[f"input.{i}"] for i in range(len(tensors))]

    def leaves(self):
        return [x.detach().requires_grad_() for x in self.inputs]

    def check(self):
        leaves = self.leaves()
        y = self.f(leaves)
        (y.flatten() * self.weight).sum().backward()
        return {"output": y.flatten()} | {f"gradient.{i}": x.grad for i, x in enumerate(leaves)}

    def forward(self):
        with torch.no_grad():
            self.f(self.inputs)

    def step(self):
        y = self.f(self.leaves())
        y.backward(torch.ones_like(y))


class Adam:
    """AdamW over a list of vectors with given gradients."""

    def __init__(self, config, tensors):
        count = len(tensors) // 2
        self.params = [tensors[f"value.{i}"].requires_grad_() for i in range(count)]
        for i, param in enumerate(self.params):
            param.grad = tensors[f"gradient.{i}"]
        self.optimizer = adamw(config, self.params)

    def check(self):
        for _ in range(3):
            self.optimizer.step()
        return {f"value.{i}": param for i, param in enumerate(self.params)}

    def forward(self):
        pass

    def step(self):
        self.optimizer.step()


def adamw(c, params):
    decay, plain = [x for x in params if x.dim() >= 2], [x for x in params if x.dim() < 2]
    groups = [{"params": decay, "weight_decay": c["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=c["lr"], betas=c["betas"], eps=c["eps"], fused=True)


class Whole:
    """A model: forward without gradients, and a whole training step with AdamW."""

    def __init__(self, kind, config, tensors):
        self.f = lambda p, inputs: WHOLE[kind](config, p, inputs)
        self.params = {k[6:]: v for k, v in tensors.items() if k.startswith("param.")}
        if kind == "dit" and "diffusers" in sys.argv[1:]:
            self.f, self.params = diffusers_dit(config, self.params)
        self.inputs = {k[6:]: v for k, v in tensors.items() if k.startswith("input.")}
        trained = [v.requires_grad_() for k, v in self.params.items() if not k.endswith("pos_embed.pos_embed")]
        self.optimizer = adamw(config["optimizer"], trained)

    def check(self):
        y, loss = self.f(self.params, self.inputs)
        loss.backward()
        out = {"output": y, "loss": loss.reshape(1)}
        # diffusers has the last block's text ask though nobody hears the answer: gradients of exactly zero, which we do not make.
        learns = lambda v: v.grad is not None and bool(v.grad.any())
        out |= {f"gradient.{k}": v.grad.flatten() for k, v in self.params.items() if learns(v)}
        self.optimizer.zero_grad()
        return out

    def forward(self):
        with torch.no_grad():
            self.f(self.params, self.inputs)

    def step(self):
        self.f(self.params, self.inputs)[1].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def load(message):
    kind, config, tensors = message["kind"], message["config"], read_tensors(message["file"])
    if kind == "adamw":
        return Adam(config, tensors)
    return Part(kind, config, tensors) if kind in PARTS else Whole(kind, config, tensors)


def main():
    torch.manual_seed(0)
    answer = {"torch": torch.__version__}
    case = None
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        command, answer = message["command"], {}
        if "threads" in message:
            torch.set_num_threads(message["threads"])
        if command == "quit":
            return
        if command == "load":
            case = load(message)
        elif command == "check":
            write_tensors(message["file"], case.check())
        elif command == "time":
            run, seconds = getattr(case, message["what"]), []
            clock = time.process_time if message["cpu"] else time.perf_counter
            for _ in range(message["count"]):
                start = clock()
                run()
                seconds.append(clock() - start)
            answer = {"seconds": seconds}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
