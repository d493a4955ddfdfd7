// The graphs that make.py wrote, in ONNX Runtime for the web: one thread of WebAssembly.
// Serve this folder with node_modules/onnxruntime-web and out/ in it.
import * as ort from './node_modules/onnxruntime-web/dist/ort.wasm.min.mjs';

ort.env.wasm.numThreads = 1;

const KINDS = { float32: Float32Array, int64: BigInt64Array, uint8: Uint8Array };
const NAMES = { F32: 'float32', I64: 'int64', U8: 'uint8' };
const say = (text) => { document.getElementById('log').textContent += text + '\n'; };

const tensor = ({ dtype, shape, values }) =>
  new ort.Tensor(dtype, KINDS[dtype].from(values, dtype === 'int64' ? BigInt : Number), shape);
const tensors = (listed) => Object.fromEntries(Object.entries(listed).map(([k, v]) => [k, tensor(v)]));
const bytes = async (file) => (await fetch(`out/${file}`)).arrayBuffer();

// The length of a header in JSON, the header, and the arrays one after the other.
async function safetensors(file) {
  const whole = await bytes(file);
  const length = Number(new DataView(whole).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(whole, 8, length)));
  delete header.__metadata__;
  return Object.fromEntries(Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => {
    const data = new KINDS[NAMES[dtype]](whole.slice(8 + length + from, 8 + length + to));
    return [name, new ort.Tensor(NAMES[dtype], data, shape)];
  }));
}

const taken = (given, session) =>
  Object.fromEntries(session.inputNames.filter((k) => k in given).map((k) => [k, given[k]]));

// The largest difference, relative to the largest value.
function off(have, want) {
  let error = 0, largest = 0;
  for (let i = 0; i < want.length; i++) {
    const difference = Math.abs(Number(have[i]) - Number(want[i]));
    error = Number.isNaN(difference) ? Infinity : Math.max(error, difference);
    largest = Math.max(largest, Math.abs(Number(want[i])));
  }
  return error / Math.max(largest, 1e-3);
}

async function check(one) {
  const options = { executionProviders: ['wasm'] };
  const before = await safetensors(`${one.model}.before.safetensors`);
  const predict = await ort.InferenceSession.create(new Uint8Array(await bytes(`${one.model}.predict.onnx`)), options);
  const outputs = await predict.run({ ...taken(before, predict), ...tensors(one.predict.inputs) });
  const predicted = Math.max(...Object.entries(one.predict.outputs).map(([k, v]) => off(outputs[k].data, v.values)));

  const step = await ort.InferenceSession.create(new Uint8Array(await bytes(`${one.model}.step.onnx`)), options);
  const after = await safetensors(`${one.model}.after.safetensors`);
  const held = taken(before, step);
  for (const name of step.inputNames.filter((k) => k.startsWith('memory:'))) {
    const { dims } = before[name.replace(/^memory:[^.]*\./, 'w:')];
    held[name] = new ort.Tensor('float32', new Float32Array(dims.reduce((a, b) => a * b, 1)), dims);
  }
  const rows = tensors(one.step.rows), losses = [];
  for (const given of one.step.each) {
    const out = await step.run({ ...held, ...taken({ ...rows, ...tensors(given) }, step) });
    losses.push(out.loss.data[0]);
    for (const [name, value] of Object.entries(out)) {
      if (name.startsWith('next:')) held[name.slice(5)] = value;
    }
  }
  // Of training it is the change that is compared: a weight hardly moves in a few steps.
  let trained = 0;
  for (const [name, value] of Object.entries(after)) {
    const start = before[name].data, change = (a) => Array.from(a, (x, i) => x - start[i]);
    trained = Math.max(trained, off(change(held[name].data), change(value.data)));
  }
  return { model: one.model, predicted, losses: off(losses, one.step.losses), trained };
}

try {
  window.results = [];
  for (const one of await (await fetch('out/cases.json')).json()) {
    const found = await check(one);
    window.results.push(found);
    say(`${found.model}: outputs off by ${found.predicted.toExponential(1)}, losses by ` +
        `${found.losses.toExponential(1)}, changes of weights by ${found.trained.toExponential(1)}`);
  }
  const bad = window.results.filter((r) => !(r.predicted < 1e-4 && r.losses < 1e-3 && r.trained < 1e-2));
  document.title = bad.length ? 'failed' : 'done';
} catch (problem) {
  say(`failed: ${problem}\n${problem.stack}`);
  document.title = 'failed';
}
