"""What a generative model gives away about the patients it learned from: attacks, their measures, and one report of them."""
