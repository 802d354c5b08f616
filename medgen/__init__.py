"""medgen: latent diffusion for medicine. Text to chest X-ray, disease progression, ECG to echocardiogram."""

__version__ = "0.1.0"
