"""A human blind comparison: pictures on the same noise, a page to vote on, a server for the votes, a report of them."""
