"""Describes graphs beyond torch.fx: sites, programs, facts about values, their files, and running them."""
