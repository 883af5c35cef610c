"""Measuring pictures: features, statistics, figures. Knows no model of ours."""
