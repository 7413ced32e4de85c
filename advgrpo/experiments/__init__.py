"""The paper's comparisons in miniature: arms, runs, pages."""
