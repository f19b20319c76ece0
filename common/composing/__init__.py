"""Configurations, schemes and libraries, the models composed of them, and the search for the best configuration."""
