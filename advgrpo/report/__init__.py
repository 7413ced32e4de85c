"""OUT/report.html: a run on one page that needs nothing else, and the bands that its curves are drawn beside."""
