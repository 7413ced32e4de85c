"""From noise to images: schedules as coefficient tables, the sampler, drawing for commands."""
