"""What files hold: shards in and out, codes, images, parts of an output and their account."""
