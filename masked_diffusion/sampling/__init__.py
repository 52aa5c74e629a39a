"""Drawing images with a trained model: solvers, editing, class names, and the files of many images."""
