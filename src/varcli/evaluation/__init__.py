"""Measuring images: features, statistics, figures. Knows no model of ours."""
