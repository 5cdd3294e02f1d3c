"""What graphs are made of, beside torch.fx: sites, programs, facts about values, their files, and running them."""
