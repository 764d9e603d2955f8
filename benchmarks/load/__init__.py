"""What a server does under more load than it can carry, and under loads that only seem small."""
