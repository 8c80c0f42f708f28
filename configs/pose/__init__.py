"""Human pose in video: experiments."""
