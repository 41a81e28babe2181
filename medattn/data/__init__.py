"""Cases and what is done to them before a network sees them: check, plan, prepare, store, sample, augment."""
