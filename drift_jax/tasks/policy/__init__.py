"""Robot control (5.3): one evaluation of a network gives a chunk of actions.

demonstrations  episodes of observations and actions; `replay` and `robomimic`
                read them from files, `selection` as names and types want it
windows         what the network is trained on: windows, normalised, in order
network         observations and noise -> actions: `observations` are encoded,
                `unet1d` acts
step            the drifting loss on actions; baselines, `diffusion` one of them
robots          control tasks, scripted experts, rollouts and their videos
config, setup, train, evaluation  as in every task
"""
