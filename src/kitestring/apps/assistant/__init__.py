"""An assistant that answers on the device and asks the cloud for the rest."""
