"""What every room uses: files, pictures, random numbers, number formats."""
