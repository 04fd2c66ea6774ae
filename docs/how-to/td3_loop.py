"""TD3 in one file and plain torch, 16 surrogate episodes at a time; `python td3_loop.py` prints what it gained."""

import copy

import gymnasium as gym
import torch
from torch import nn

import acodm_env  # noqa: F401 (registers the environments)

NUM_ENVS, BATCH, GAMMA, TAU, RATE, NOISE, RANDOM, PENALTY = 16, 128, 0.95, 0.005, 1e-3, 0.2, 8, 0.02
GAIN = {"terms": {"progress": 1.0}, "progress_over_uniform": True}  # nats below what uniform sampling reaches


def network(inputs, outputs):
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


def learn(waves, seed=0):
    """Mean gain (nats) of each wave of episodes; the first ones play at random, the last one without noise."""
    torch.manual_seed(seed)
    envs = gym.make_vec("acodm/Surrogate-v0", NUM_ENVS, "vector_entry_point", reward=GAIN)
    size, k = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    fast = nn.ModuleList([network(size, k), network(size + k, 1), network(size + k, 1)])
    slow, replay, gains, shift, scale, unit = copy.deepcopy(fast), [], [], 0.0, 1.0, 1.0
    (actor, *critics), (slow_actor, *slow_critics) = fast, slow
    actor_step, critic_step = (torch.optim.AdamW(part.parameters(), RATE) for part in (actor, fast[1:]))
    for wave in range(waves):
        seen, done, gain = torch.tensor(envs.reset(seed=seed + wave)[0]), False, 0.0
        while not done:
            chosen = torch.rand(NUM_ENVS, k) * 2 - 1 if wave < RANDOM else actor((seen - shift) / scale).tanh().detach()
            action = (chosen + (RANDOM <= wave < waves - 1) * NOISE * torch.randn(NUM_ENVS, k)).clamp(-1, 1)
            after, reward, _, truncated, _ = envs.step(action.numpy())
            after, reward, done = torch.tensor(after), torch.tensor(reward)[:, None], bool(truncated.all())
            replay.append(torch.cat([seen, action, after, reward, torch.full_like(reward, done)], 1))
            seen, gain = after, gain + reward.mean().item()
        gains.append(gain)
        data = torch.cat(replay)  # (transitions, size + k + size + 1 + 1)
        if wave < RANDOM:  # observations and rewards are standardised as the random waves see them
            shift, scale, unit = data[:, :size].mean(0), data[:, :size].std(0) + 1e-4, data[:, -2].std()
        for update in range(80 if wave >= RANDOM - 1 else 0):
            s, a, s2, r, end = data[torch.randint(len(data), (BATCH,))].split([size, k, size, 1, 1], 1)
            s, s2 = (s - shift) / scale, (s2 - shift) / scale
            a2 = (torch.tanh(slow_actor(s2)) + (0.2 * torch.randn(BATCH, k)).clamp(-0.5, 0.5)).clamp(-1, 1)
            value = torch.min(*(critic(torch.cat([s2, a2], 1)) for critic in slow_critics))
            target = (r / unit + GAMMA * (1 - end) * value).detach()
            loss = sum((critic(torch.cat([s, a], 1)) - target).square().mean() for critic in critics)
            critic_step.zero_grad(), loss.backward(), critic_step.step()
            if update % 2:  # half as often; the penalty keeps the actor's logits out of tanh's flat ends
                logits = actor(s)
                loss = PENALTY / 2 * logits.square().sum(1).mean() - critics[0](torch.cat([s, logits.tanh()], 1)).mean()
                actor_step.zero_grad(), loss.backward(), actor_step.step()
                for p, q in zip(fast.parameters(), slow.parameters(), strict=True):
                    q.data.lerp_(p.data, TAU)
    return gains


if __name__ == "__main__":
    print(f"gain over uniform sampling: {learn(40)[-1]:+.4f} nats")
