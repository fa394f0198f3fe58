"""Where a step's pool comes from: the samplers, and what the settings of the draw stand for."""
