"""How can I use the models of keras.applications? As any others; here untrained, since that needs no download.

    python examples/faq/applications.py                  # all of them: a minute or so on a laptop
    python examples/faq/applications.py ResNet50

With `weights="imagenet"` Keras fetches the trained weights.
"""

import sys

import numpy as np

import fastdp
from fastdp.utils import multi_gpu_model  # was: from keras.utils import multi_gpu_model

from keras.applications.inception_v3 import InceptionV3  # isort: skip
from keras.applications.resnet50 import ResNet50  # isort: skip
from keras.applications.vgg16 import VGG16  # isort: skip
from keras.applications.vgg19 import VGG19  # isort: skip
from keras.applications.xception import Xception  # isort: skip

if len(fastdp.devices()) < 2:
    fastdp.set_virtual_devices(2)

# The smallest image size of each model.
SIZES = {VGG16: 32, VGG19: 32, ResNet50: 32, InceptionV3: 75, Xception: 71}

for application, size in SIZES.items():
    if sys.argv[1:] and application.__name__ not in sys.argv[1:]:
        continue
    model = application(weights=None, include_top=True, input_shape=(size, size, 3), classes=5)
    parallel_model = multi_gpu_model(model, gpus=2)
    parallel_model.compile(loss="categorical_crossentropy", optimizer="sgd")
    x = np.random.default_rng(0).random((3, size, size, 3), np.float32)
    loss = parallel_model.train_on_batch(x, np.eye(5)[[0, 1, 2]])
    print(f"{application.__name__}: {model.count_params():,} parameters, loss {float(loss):.3f}")
