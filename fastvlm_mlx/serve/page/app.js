// The page of `fastvlm serve`: pictures and questions go in, answers with their timings come out.
// What a model, a server or a file says is only ever set as text, never read as HTML, and every
// address is relative, so that the page works below any path.

const BUILT_IN = [
  { label: "Describe", text: "Describe the image." },
  { label: "Count", text: "How many objects are there?" },
  { label: "Read", text: "What does the text say?" },
  { label: "Expression", text: "What facial expression is this? Answer in one or two words." },
  { label: "Emoji", text: "Which emoji fits this picture best? Answer with one emoji only." },
  { label: "Yes or no", text: "Is there a person in the picture? Answer yes or no.", edit: "a person" },
];
const SIZES_IN_PATCHES = [4, 6, 8, 12, 16, 20, 24];
const SENT_AS_THEY_ARE = /^image\/(jpeg|png|webp)$/; // other pictures are drawn again where possible
const LARGEST_FILE = 8 * 2 ** 20; // larger pictures are made smaller before they are sent
const MOST_PIXELS = 40e6;
const LARGEST_SIDE = 2048;
const THUMBNAIL_SIDE = 144;
const CARDS_AT_ONCE = 48;
const HEALTH_EVERY = 3000;
const SILENCE = 60000; // a server that lives sends a keep-alive at least every 15 s
const STAGES = ["queue", "read", "encode", "prefill"];

const $ = (id) => document.getElementById(id);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));
const event = (target, name) =>
  new Promise((done) => target.addEventListener(name, done, { once: true }));

/** An error whose message is a sentence for the person. */
class Said extends Error {
  constructor(sentence, { again = false, wait = 0, lost = false } = {}) {
    super(sentence);
    this.again = again; // it may go better next time
    this.wait = wait; // seconds until then
    this.lost = lost; // the server can't be reached
  }
}

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows only an icon. */
function iconButton(name, label, act) {
  const button = make("button", { type: "button", className: "quiet icon", title: label }, icon(name));
  button.setAttribute("aria-label", label);
  button.addEventListener("click", () => act(button));
  return button;
}

function show(node, shown) {
  node.hidden = !shown;
}

/** Set an alert, with a button where trying again may help; an empty sentence takes it away. */
function say(place, sentence, again = null) {
  place.replaceChildren();
  if (!sentence) return;
  place.append(make("span", { textContent: sentence }));
  if (again) {
    const button = make("button", { type: "button", className: "quiet", textContent: "Try again" });
    button.addEventListener("click", again);
    place.append(button);
  }
}

// What the browser keeps. A browser may forbid it, and it may be full: then `keep` is false.

const PREFIX = "fastvlm:";

function kept(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function keep(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function forget(name) {
  try {
    localStorage.removeItem(PREFIX + name);
  } catch {
    // What can't be read was not kept either.
  }
}

function keptNames(start) {
  try {
    const names = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX + start));
    return names.map((name) => name.slice(PREFIX.length)).sort();
  } catch {
    return [];
  }
}

// The server

const server = { up: false, model: null, key: "", asking: null };

try {
  server.key = sessionStorage.getItem(PREFIX + "key") ?? "";
} catch {
  // The key is then asked for once per load.
}

/** Fetch from the server with the key, which is asked for where the server wants one. */
async function call(path, options = {}) {
  for (;;) {
    const sent = server.key;
    const headers = { ...options.headers };
    if (sent) headers.Authorization = `Bearer ${sent}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Said("The server can't be reached.", { again: true, lost: true });
    }
    if (response.status !== 401) return response;
    if (sent === server.key) await askForKey(sent !== "");
  }
}

/** Open the dialog once for all who wait for the key. */
function askForKey(refused) {
  server.asking ??= new Promise((done, fail) => {
    const dialog = $("key-dialog");
    $("key-said").textContent = refused
      ? "The server did not accept this key. It wants the one that it was started with."
      : "This server asks for the key that it was started with.";
    $("key").value = "";
    server.key = "";
    dialog.showModal();
    dialog.addEventListener(
      "close",
      () => {
        server.asking = null;
        if (server.key) return done();
        link("locked", "Key needed");
        fail(new Said("This server needs its API key."));
      },
      { once: true },
    );
  });
  return server.asking;
}

function enterKey(submitted) {
  submitted.preventDefault();
  server.key = $("key").value.trim();
  link("waiting", "Connecting…");
  try {
    sessionStorage.setItem(PREFIX + "key", server.key);
  } catch {
    // It holds as long as the page is open.
  }
  $("key-dialog").close();
}

function link(state, text) {
  if ($("link-text").textContent === text) return; // it would be announced again
  $("link").dataset.state = state;
  $("link-text").textContent = text;
}

/** Ask whether the server lives, and read its model when it has just come up. */
async function check() {
  try {
    const response = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(8000) });
    if (response.status >= 500) {
      server.up = false;
      return link("broken", "Model stopped");
    }
    if (!server.up && !server.asking) await readModel();
  } catch (error) {
    if (error instanceof Said && !error.lost) return refused(error.message);
    // A server may be too busy with an answer to reply in time; a dead one refuses at once.
    if (error.name === "TimeoutError" && running) return;
    away();
  }
}

/** Said once: it is asked again and again. */
function refused(sentence) {
  if ($("link").dataset.state === "waiting") say($("answer-alert"), sentence);
  if ($("link").dataset.state !== "locked") link("broken", "Not allowed");
}

function away() {
  server.up = false;
  link("down", "Server away, trying again");
}

async function watchServer() {
  addEventListener("online", check);
  for (let wait = 500; ; await pause(wait)) {
    if (!document.hidden) await check();
    wait = server.up ? HEALTH_EVERY : Math.min(wait * 1.5, HEALTH_EVERY);
  }
}

async function untilUp(signal) {
  while (!server.up && !signal.aborted) {
    await pause(400);
  }
}

async function readModel() {
  if ($("link").dataset.state === "locked") return;
  const response = await call("v1/models");
  if (!response.ok) throw new Said(await reason(response), { lost: response.status >= 500 });
  const { data } = await response.json();
  const { id, fastvlm = {} } = data[0];
  server.model = { id, ...fastvlm };
  server.up = true;
  link("up", "Connected");
  showModel();
}

/** Before a question goes out: with what name, and whether to anyone at all. */
async function knowModel() {
  if (server.up) return;
  if (!server.model) link("waiting", "Connecting…");
  await check();
  if ($("link").dataset.state === "locked") throw new Said("This server needs its API key.");
  if (!server.model) throw new Said("The server can't be reached.", { again: true, lost: true });
}

function showModel() {
  const { id, precision, image_size: own, patch_size: patch = 64 } = server.model;
  $("model").textContent = id;
  $("model").title = id;
  $("precision").textContent = precision ?? "";
  show($("precision"), precision);
  show($("size-label"), own);
  if (own) {
    const sizes = new Set([...SIZES_IN_PATCHES.map((n) => n * patch), own]);
    const options = [...sizes].sort((a, b) => a - b).map((size) => sizeOption(size, patch, own));
    $("size").replaceChildren(...options);
    $("size").value = kept(`size:${id}`, own);
    if (!$("size").value) $("size").value = own;
  }
  const nano = /(^|[^a-z])nano([^a-z]|$)/i.test(id) && !kept("knows-nano", false);
  show($("note"), nano);
  if (nano) $("note").replaceChildren(nanoNote(), iconButton("close", "Close this note", closeNote));
}

function sizeOption(size, patch, own) {
  const tokens = (size / patch) ** 2;
  const said = `${size} px · ${Math.round(tokens)} tokens${size === own ? " ✓" : ""}`;
  return make("option", { value: size, textContent: said });
}

function nanoNote() {
  const said = make("span");
  said.append(
    "This is nano, the small bundled model: it names emoji, counts up to nine of them and reads short notes. For photographs, start the server with ",
    make("code", { textContent: "--model apple/FastVLM-0.5B" }),
    ".",
  );
  return said;
}

function closeNote() {
  keep("knows-nano", true);
  show($("note"), false);
  $("question").focus();
}

/** What an error reply says, as a sentence. */
async function reason(response) {
  let said = "";
  try {
    const body = await response.json();
    said = body.error?.message ?? body.error ?? body.detail ?? "";
  } catch {
    // Not every error reply is JSON; one of a proxy is not.
  }
  if (typeof said === "string" && said) return said;
  if (response.status === 413) return "The pictures are larger than the server takes.";
  return `The server answered with an error (${response.status}).`;
}

// Pictures

let pictures = []; // of the next question
let selected = 0;
let taking = Promise.resolve(); // a question waits for the pictures that are being read

function draw(source, width, height, side, type = "image/jpeg", quality = 0.92) {
  const scale = Math.min(1, side / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  if (type === "image/jpeg") {
    context.fillStyle = "#fff"; // JPEG has no transparency
    context.fillRect(0, 0, canvas.width, canvas.height);
  }
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL(type, quality);
}

const thumbnail = (source, width, height) =>
  draw(source, width, height, THUMBNAIL_SIDE, "image/jpeg", 0.72);

function dataUri(file) {
  const reader = new FileReader();
  return new Promise((done, fail) => {
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Said(`${file.name} can't be read.`));
    reader.readAsDataURL(file);
  });
}

async function decoded(address) {
  const image = new Image();
  image.src = address;
  try {
    await image.decode();
    // A drawing may have no size of its own.
    return { image, width: image.naturalWidth || 1024, height: image.naturalHeight || 1024 };
  } catch {
    return null; // HEIC, in most browsers; the server may read it all the same
  }
}

async function readPicture(file) {
  const name = file.name || "picture";
  const address = URL.createObjectURL(file);
  const found = await decoded(address);
  if (!found) {
    URL.revokeObjectURL(address);
    const picture = file.type.startsWith("image/") || /\.(heic|heif|avif|tiff?)$/i.test(name);
    if (!picture || !file.size) throw new Said(`“${name}” is not a picture.`);
    return { name, sent: await dataUri(file), address: "", thumb: "" };
  }
  const { image, width, height } = found;
  let sent;
  if (file.size > LARGEST_FILE || width * height > MOST_PIXELS)
    sent = draw(image, width, height, LARGEST_SIDE);
  else if (SENT_AS_THEY_ARE.test(file.type)) sent = await dataUri(file);
  else sent = draw(image, width, height, LARGEST_SIDE, "image/png");
  return { name, sent, address, width, height, thumb: thumbnail(image, width, height) };
}

/** Take new pictures in the place of the old ones, or beside them. */
function take(files, beside = false) {
  taking = files.length ? takeAll(files, beside) : taking;
}

async function takeAll(files, beside) {
  const read = await Promise.allSettled([...files].map(readPicture));
  const good = read.filter((one) => one.status === "fulfilled").map((one) => one.value);
  const bad = read.filter((one) => one.status === "rejected").map((one) => one.reason.message);
  say($("picture-alert"), bad.join(" "));
  if (!good.length) return;
  camera.stop();
  if (!beside) {
    for (const picture of pictures) URL.revokeObjectURL(picture.address);
    pictures = [];
    newConversation();
  }
  pictures.push(...good);
  selected = pictures.length - good.length;
  showPictures();
  if (matchMedia("(pointer: fine)").matches) $("question").focus({ preventScroll: true });
}

function removePicture(index) {
  const [gone] = pictures.splice(index, 1);
  URL.revokeObjectURL(gone.address);
  selected = Math.min(selected, Math.max(0, pictures.length - 1));
  if (!pictures.length) newConversation();
  showPictures();
  ($("strip").querySelector("[aria-current=true]") ?? $("choose")).focus();
}

function showPictures() {
  const state = camera.on ? "camera" : pictures.length ? "pictures" : "empty";
  const picture = state === "pictures" ? pictures[selected] : null;
  $("stage").dataset.state = state;
  show($("empty"), state === "empty");
  show($("video"), state === "camera");
  show($("live"), state === "camera");
  show($("shown"), picture?.address);
  show($("unshown"), picture && !picture.address);
  if (picture?.address) {
    $("shown").src = picture.address;
    $("shown").alt = picture.name;
  } else if (picture) {
    $("unshown").textContent = `${picture.name}: this browser can't show it, but the server may read it.`;
  }
  show($("tools"), state !== "empty");
  show($("strip"), picture);
  $("strip").replaceChildren(...(picture ? pictures.map(stripItem) : []));
  show($("add"), picture);
  show($("camera-on-2"), picture);
  show($("camera-off"), state === "camera");
  show($("choose-2"), state === "camera");
  if (state !== "camera") show($("speed"), false);
}

function stripItem(picture, index) {
  const choose = make("button", { type: "button", className: "thumb" });
  choose.setAttribute("aria-label", `Show ${picture.name}`);
  choose.setAttribute("aria-current", String(index === selected));
  choose.append(picture.thumb ? make("img", { src: picture.thumb, alt: "" }) : icon("picture"));
  choose.addEventListener("click", () => {
    selected = index;
    showPictures();
    $("strip").querySelector("[aria-current=true]").focus();
  });
  const remove = iconButton("close", `Remove ${picture.name}`, () => removePicture(index));
  return make("li", {}, choose, remove);
}

/** A picture that comes with the page, with a question that fits it. */
function takeSample(button) {
  if (!$("question").value.trim()) setQuestion(button.dataset.question);
  taking = fetchSample(button);
}

async function fetchSample(button) {
  const address = button.firstElementChild.getAttribute("src");
  const response = await fetch(address).catch(() => null);
  if (!response?.ok) return say($("picture-alert"), "The server can't be reached.");
  const name = address.replace("sample-", "");
  await takeAll([new File([await response.blob()], name, { type: "image/png" })], false);
}

function filesOf(transfer) {
  const files = [...(transfer?.files ?? [])];
  if (files.length) return files;
  const items = [...(transfer?.items ?? [])].filter((item) => item.kind === "file");
  return items.map((item) => item.getAsFile()).filter(Boolean);
}

// The camera

const camera = {
  on: false,
  stream: null,
  muted: false,
  lost: false,
  starting: null,

  /** Start it, or switch to another one. False, with a sentence said, where that can't be. */
  async start(id = "", again = false) {
    this.starting = Symbol("start");
    const mine = this.starting;
    if (!navigator.mediaDevices?.getUserMedia) {
      say($("picture-alert"), cameraTrouble({ name: "Insecure" }));
      return false;
    }
    this.release();
    const which = id ? { deviceId: { exact: id } } : { facingMode: "environment" };
    const size = { width: { ideal: 1280 }, height: { ideal: 960 } };
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { ...which, ...size }, audio: false });
    } catch (error) {
      if (mine !== this.starting) return false;
      if (again && error.name !== "NotAllowedError") return false; // `find` goes on
      this.stop();
      say($("picture-alert"), cameraTrouble(error));
      return false;
    }
    if (mine !== this.starting) {
      for (const track of stream.getTracks()) track.stop();
      return false;
    }
    await this.use(stream);
    return true;
  },

  async use(stream) {
    const [track] = stream.getVideoTracks();
    if (!this.on) newConversation();
    Object.assign(this, { on: true, stream, muted: track.muted, lost: false });
    track.addEventListener("mute", () => this.turn(track, { muted: true }));
    track.addEventListener("unmute", () => this.turn(track, { muted: false }));
    track.addEventListener("ended", () => this.turn(track, { lost: true }));
    $("video").srcObject = stream;
    say($("picture-alert"), "");
    showPictures();
    showPause();
    $("video").play().catch(() => {}); // it is muted, and so may play; `ready` waits for it
    await this.list(track.getSettings().deviceId);
  },

  /** Note what became of a track, and go on when it is back. */
  turn(track, change) {
    if (!this.stream?.getTracks().includes(track)) return; // one that was let go
    Object.assign(this, change);
    showPause();
    if (change.lost) this.find(track.getSettings().deviceId);
  },

  /** Look for a camera until there is one again. */
  async find(id) {
    while (this.lost) {
      await pause(1000);
      const found = await navigator.mediaDevices.enumerateDevices().catch(() => []);
      const cameras = found.filter((device) => device.kind === "videoinput");
      const same = cameras.some((device) => device.deviceId === id);
      if (this.lost && cameras.length) await this.start(same ? id : "", true);
    }
  },

  async list(current) {
    const found = await navigator.mediaDevices.enumerateDevices().catch(() => []);
    const cameras = found.filter((device) => device.kind === "videoinput");
    const options = cameras.map((device, index) =>
      make("option", { value: device.deviceId, textContent: device.label || `Camera ${index + 1}` }),
    );
    $("cameras").replaceChildren(...options);
    if (current) $("cameras").value = current;
    show($("cameras-label"), this.on && cameras.length > 1);
  },

  release() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.stream = null;
    $("video").srcObject = null;
  },

  stop() {
    this.starting = null;
    this.release();
    Object.assign(this, { on: false, muted: false, lost: false });
    stopContinuous();
    show($("cameras-label"), false);
    showPictures();
    showPause();
  },

  get ready() {
    return this.on && !this.muted && !this.lost && !document.hidden && $("video").readyState >= 2;
  },

  /** The newest frame, as a picture. */
  frame() {
    const video = $("video");
    const { videoWidth: width, videoHeight: height } = video;
    const sent = draw(video, width, height, Math.max(imageSize() ?? 1024, 256), "image/jpeg", 0.9);
    return { name: "camera", sent, width, height, thumb: thumbnail(video, width, height) };
  },

  /** Wait until there is a frame that was not there before. */
  async next(signal) {
    while (!this.ready && !signal.aborted) await pause(100);
    const video = $("video");
    if (!video.requestVideoFrameCallback || signal.aborted) return;
    await Promise.race([new Promise((done) => video.requestVideoFrameCallback(done)), pause(500)]);
    if (!this.ready) await this.next(signal);
  },
};

function cameraTrouble({ name }) {
  if (name === "Insecure")
    return window.isSecureContext
      ? "This browser gives pages no camera."
      : "Browsers allow the camera only over https or on the same computer: start the server with --certfile and --keyfile, or open this page there.";
  if (name === "NotAllowedError" || name === "SecurityError")
    return "The camera is not allowed here: allow it in the browser's settings for this page, then try again.";
  if (name === "NotFoundError" || name === "OverconstrainedError")
    return "No camera was found: connect one and try again.";
  if (name === "NotReadableError" || name === "AbortError")
    return "The camera is busy: close the other program that uses it and try again.";
  return `The camera could not be started (${name}).`;
}

function showPause() {
  let said = "";
  if (camera.lost) said = "The camera was disconnected. This goes on when it is back.";
  else if (camera.muted) said = "The camera sends no picture now. This goes on when it does.";
  else if (camera.on && continuous && document.hidden) said = "Paused while this tab is hidden.";
  $("pause").textContent = said;
  $("stage").dataset.paused = String(said !== "");
}

async function showAgain() {
  if (document.hidden || !camera.on || !continuous) return showPause();
  $("pause").textContent = "It was paused while the tab was hidden, and goes on.";
  await pause(2500);
  showPause();
}

// Asking

let conversation; // its messages, the pictures that stand in them, and thumbnails of the last ones
let asking = false; // a second click while the first one waits for something asks nothing
let running = null; // the AbortController of the answer that is coming in
let continuous = null; // that of the continuous mode
let latest = null; // the turn in the answer's panel whose figures are shown

const imageSize = () => Number($("size").value) || null;

function newConversation() {
  conversation = { id: `${Date.now()}`, messages: [], pictures: new Set(), images: [] };
  show($("new-chat"), false);
}

function content(prompt, added) {
  const parts = added.map(({ sent }) => ({ type: "image_url", image_url: { url: sent } }));
  return [...parts, { type: "text", text: prompt }];
}

/** The pictures that go with the next question. */
function picturesToSend() {
  const follows = conversation.messages.length > 0;
  if (camera.on) {
    if (follows) return [];
    if (!camera.ready) throw new Said("The camera has no picture yet: ask again in a moment.");
    return [camera.frame()];
  }
  const added = pictures.filter((picture) => !conversation.pictures.has(picture));
  if (!added.length && !follows)
    throw new Said("Choose, drop or paste a picture first, or use the camera.");
  return added;
}

async function askOnce(prompt = $("question").value.trim()) {
  if (asking) return;
  asking = true;
  try {
    await taking;
    if (running || continuous) return;
    say($("answer-alert"), "");
    if (!$("chat").checked) newConversation();
    if (!prompt) throw new Said("Write a question, or choose one below the picture.");
    const added = picturesToSend();
    if ($("chat").checked) setQuestion("");
    await ask(prompt, added);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (error.lost) away();
    if (!$("question").value) setQuestion(prompt);
    say($("answer-alert"), sentence(error), error.again ? () => askOnce(prompt) : null);
  } finally {
    asking = false;
  }
}

function sentence(error) {
  if (error instanceof Said) return error.message;
  console.error(error);
  return "Something went wrong in this page; its console says more.";
}

/** Send one question and show its answer as it comes. */
async function ask(prompt, added) {
  await knowModel();
  const asked = { role: "user", content: content(prompt, added) };
  const body = {
    model: server.model.id,
    messages: [...conversation.messages, asked],
    stream: true,
    stream_options: { include_usage: true },
  };
  if (imageSize()) body.image_size = imageSize();
  const turn = beginTurn(prompt, added);
  const talk = conversation;
  const stopper = new AbortController();
  running = stopper;
  showRunning();
  try {
    await receive(turn, body, stopper);
  } catch (error) {
    turn.entry.finish = error.name === "AbortError" ? "stopped" : "broken off";
    throw error;
  } finally {
    if (running === stopper) running = null;
    showRunning();
    endTurn(turn, talk, asked, added);
  }
}

async function receive(turn, body, stopper) {
  const started = performance.now();
  const silence = watchSilence(stopper);
  try {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: stopper.signal,
    });
    if (!response.ok) throw await refusal(response);
    for await (const chunk of chunks(response, silence.heard)) {
      if (chunk.error) throw new Said(chunk.error.message ?? "The answer broke off.", { again: true });
      read(turn, chunk, started);
    }
    if (!turn.entry.finish) throw brokenOff();
  } catch (error) {
    if (silence.over) throw new Said("The server has been silent for a minute.", { again: true });
    throw error;
  } finally {
    silence.stop();
  }
}

async function refusal(response) {
  const wait = Number(response.headers.get("Retry-After")) || 2;
  const said = await reason(response);
  if (response.status === 404) server.up = false; // another model, it may be: `check` reads it
  if ([404, 429].includes(response.status) || response.status >= 500)
    return new Said(said, { again: true, wait });
  return new Said(said);
}

const brokenOff = () =>
  new Said("The server went away before the answer was complete.", { again: true, lost: true });

/** Stop waiting for a server from which nothing at all comes any more. */
function watchSilence(stopper) {
  const watch = { over: false, timer: 0 };
  watch.stop = () => clearTimeout(watch.timer);
  watch.heard = () => {
    watch.stop();
    watch.timer = setTimeout(() => {
      watch.over = true;
      stopper.abort();
    }, SILENCE);
  };
  return watch;
}

/** The events of a streamed reply, parsed. */
async function* chunks(response, heard) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        throw error.name === "AbortError" ? error : brokenOff();
      }
      if (part.done) return;
      heard();
      const lines = (rest + decoder.decode(part.value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // blank lines, comments and names of events
        const data = line.slice(5).trim();
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function read(turn, chunk, started) {
  const { entry } = turn;
  const choice = chunk.choices?.[0];
  const text = choice?.delta?.content;
  if (text) {
    entry.seen ??= (performance.now() - started) / 1000;
    append(turn, text);
  }
  if (choice?.finish_reason) entry.finish = choice.finish_reason;
  if (chunk.usage) entry.usage = chunk.usage;
  if (chunk.timings) entry.timings = chunk.timings;
}

// The answer's panel

function beginTurn(prompt, added) {
  const thumbs = added.map(({ name, width, height, thumb }) => ({ name, width, height, thumb }));
  if (thumbs.length) conversation.images = thumbs;
  const entry = {
    id: `${Date.now()}-${Math.random().toString(36).slice(2, 8)}`,
    time: new Date().toISOString(),
    chat: conversation.id,
    model: server.model.id,
    precision: server.model.precision,
    image_size: imageSize(),
    prompt,
    images: conversation.images,
    answer: "",
  };
  if (continuous) entry.run = continuous.id;
  const text = make("p", { className: "text coming" });
  const node = make("div", { className: "turn" });
  node.append(turnHead(entry, thumbs), text);
  const turn = { entry, node, text, alone: !conversation.messages.length, first: true };
  if (continuous) return turn; // the last answer stays until this one begins
  place(turn);
  $("reading").scrollIntoView({ block: "nearest" }); // on a phone it may lie above what is seen
  show($("copy"), false);
  show($("figures"), false);
  return turn;
}

function place(turn) {
  latest = turn;
  if (turn.alone) $("reading").replaceChildren();
  $("reading").append(turn.node);
  $("reading").scrollTop = $("reading").scrollHeight;
}

function showNothing(said) {
  $("reading").replaceChildren(make("p", { className: "nothing", textContent: said }));
}

function turnHead(entry, thumbs) {
  const head = make("div", { className: "asked" });
  for (const { thumb } of thumbs) if (thumb) head.append(make("img", { src: thumb, alt: "" }));
  head.append(make("p", { textContent: entry.prompt }));
  return head;
}

/** Add to the answer. It is shown once per frame of the screen, however fast it comes. */
function append(turn, text) {
  turn.entry.answer += text;
  if (turn.first) {
    turn.first = false;
    if (!turn.node.isConnected) place(turn);
    following(() => showFigures(turn.entry));
  }
  turn.drawing ??= requestAnimationFrame(() => {
    turn.drawing = null;
    if (!turn.ended) following(() => (turn.text.textContent = turn.entry.answer));
  });
}

/** Whoever has scrolled up to read stays there; who was at the end stays at the end. */
function following(change) {
  const box = $("reading");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 32;
  change();
  if (follows) box.scrollTop = box.scrollHeight;
}

function endTurn(turn, talk, asked, added) {
  const { entry, text, node } = turn;
  turn.ended = true;
  text.classList.remove("coming");
  entry.answer = entry.answer.trim();
  if (!entry.answer && entry.finish !== "stop" && entry.finish !== "length") {
    node.remove(); // nothing came, and nothing is kept of it but the question
    if (!$("reading").childElementCount) showNothing("No answer came.");
    if (latest === turn) latest = null;
    if (!continuous && !$("question").value) setQuestion(entry.prompt);
    return;
  }
  if (turn.first && !node.isConnected) place(turn); // one that came without a word
  if (node.isConnected) following(() => showEnd(turn)); // else a new chat has taken its place
  if (entry.finish !== "broken off") {
    talk.messages.push(asked, { role: "assistant", content: entry.answer });
    for (const picture of added) talk.pictures.add(picture);
  }
  if (remember(entry)) announce(entry.answer);
}

function showEnd({ entry, text, node }) {
  text.textContent = entry.answer || "(an empty answer)";
  text.classList.add(...shape(entry.answer));
  const note = finishNote(entry);
  if (note) node.append(make("p", { className: "finish", textContent: note }));
  node.append(make("p", { className: "meta", textContent: figuresLine(entry) }));
  showFigures(entry);
  show($("new-chat"), $("chat").checked);
  show($("copy"), entry.answer);
}

/** How large an answer is set: an emoji alone is drawn huge, a few words are large. */
function shape(answer) {
  const emoji = /^(\p{Extended_Pictographic}|\p{Emoji_Modifier}|\u200d|\ufe0f|\s){1,8}$/u;
  if (emoji.test(answer)) return ["emoji"];
  return answer.length < 90 ? ["short"] : [];
}

function finishNote({ finish }) {
  if (finish === "length") return "Cut off at the limit of tokens.";
  if (finish === "stopped") return "Stopped.";
  return finish === "broken off" ? "Broken off." : "";
}

// One announcement per answer: the text is set anew even where it is the same.
function announce(text) {
  $("announce").textContent = "";
  setTimeout(() => ($("announce").textContent = text), 50);
}

// Timings

const first = (entry) => entry.timings?.first_token ?? entry.seen;

function seconds(value) {
  if (value == null || Number.isNaN(value)) return "–";
  if (value < 0.00995) return `${(value * 1000).toFixed(1)} ms`;
  return value < 0.9995 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}

function rate(entry) {
  const value = entry.timings?.tokens_per_second;
  if (value == null) return "–";
  return value < 99.95 ? value.toFixed(1) : String(Math.round(value));
}

const figuresLine = (entry) => `${seconds(first(entry))} to the first token · ${rate(entry)} tokens/s`;

function showFigures(entry) {
  show($("figures"), true);
  $("first").textContent = seconds(first(entry));
  $("rate").textContent = rate(entry);
  show($("details"), entry.timings);
  if (entry.timings && $("details").open) fillDetails($("details-body"), entry);
  if (camera.on) {
    show($("speed"), true);
    $("speed").textContent = seconds(first(entry));
  }
}

function fillDetails(place, entry) {
  const { timings, usage, seen } = entry;
  const spent = STAGES.map((name) => Math.max(0, timings[name] ?? 0));
  const rest = Math.max(0, (timings.first_token ?? 0) - spent.reduce((a, b) => a + b, 0));
  const bar = make("div", { className: "bar" });
  bar.setAttribute("aria-hidden", "true");
  for (const [index, time] of [...spent, rest].entries()) {
    const piece = make("i", { className: STAGES[index] ?? "rest" });
    piece.style.flexGrow = time * 1000; // a sum below 1 would not fill the bar
    bar.append(piece);
  }
  const rows = [
    ...STAGES.map((name, index) => [name, STAGE_NAMES[name], seconds(spent[index])]),
    ...(rest > 0.00005 ? [["rest", "First step", seconds(rest)]] : []),
    ["", "Until seen here", seconds(seen)],
    ["", "Cached tokens", cached(timings.cached_tokens, usage?.prompt_tokens)],
    ["", "Cached images", String(timings.cached_images ?? 0)],
    ["", "Answer", usage ? `${usage.completion_tokens} tokens` : "–"],
    ["", "Image size", entry.image_size ? `${entry.image_size} px` : "–"],
  ];
  place.replaceChildren(bar, make("dl", {}, ...rows.map(detail)));
}

const STAGE_NAMES = { queue: "Queue", read: "Read", encode: "Encode", prefill: "Prefill" };

const cached = (hits = 0, all = null) => (all == null ? `${hits}` : `${hits} of ${all}`);

const detail = ([name, term, value]) =>
  make("div", { className: name }, make("dt", { textContent: term }), make("dd", { textContent: value }));

// Copying works without navigator.clipboard too, which plain http does not have.

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { value: text, className: "unseen" });
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    before?.focus();
    return done;
  }
}

async function copyFrom(button, text) {
  const done = await copy(text);
  button.dataset.done = String(done);
  announce(done ? "Copied." : "It could not be copied: select the text instead.");
  await pause(1200);
  delete button.dataset.done;
}

// History: each answer is kept under a name of its own, so that a full storage takes none away.

const history = []; // oldest first
let cardsShown = CARDS_AT_ONCE;
let leaving = false;

/** Keep an answer; true if it is a new one. */
function remember(entry) {
  const last = history.at(-1);
  const again = entry.run && entry.run === last?.run && entry.prompt === last.prompt;
  if (again && entry.answer === last.answer) {
    repeat(last, entry);
    return false;
  }
  history.push(entry);
  save(entry);
  if (entry.unsaved) sayFull();
  if (leaving) return true; // a page that is left loads no pictures any more
  $("cards").prepend(card(entry));
  while ($("cards").childElementCount > cardsShown) $("cards").lastElementChild.remove();
  showHistory();
  return true;
}

/** A scene that stays as it is fills no history: its entry is counted on. */
function repeat(last, entry) {
  const { time, timings, usage, seen, images } = entry;
  const counted = { times: (last.times ?? 1) + 1, since: last.since ?? last.time };
  Object.assign(last, counted, { time, timings, usage, seen, images });
  save(last);
  const foot = $("cards").firstElementChild.querySelector(".card-foot");
  foot.querySelector(".meta").textContent = figuresLine(last);
  foot.querySelector(".when").replaceChildren(...cardWhen(last));
}

function save(entry) {
  const { unsaved, ...all } = entry;
  entry.unsaved = !keep(`answer:${entry.id}`, all);
}

/** After room was made. */
function saveRest() {
  for (const entry of history) if (entry.unsaved) save(entry);
  if (!history.some((entry) => entry.unsaved)) say($("history-alert"), "");
}

function sayFull() {
  say(
    $("history-alert"),
    "The browser's storage is full or closed: new answers stay only while this page is open. Export them, or clear the history.",
  );
}

function loadHistory() {
  for (const name of keptNames("answer:")) {
    const entry = kept(name, null);
    if (entry?.id && typeof entry.answer === "string") history.push({ images: [], ...entry });
  }
  history.sort((a, b) => (a.time < b.time ? -1 : 1));
  showCards();
}

function showCards() {
  $("cards").replaceChildren(...history.slice(-cardsShown).reverse().map(card));
  showHistory();
}

function showHistory() {
  show($("history"), history.length);
  show($("more"), history.length > $("cards").childElementCount);
  $("count").textContent = history.length;
}

function card(entry) {
  const text = make("p", { className: "text", textContent: entry.answer || "(an empty answer)" });
  text.classList.add(...shape(entry.answer));
  const words = make("div", { className: "words" });
  words.append(make("h3", { textContent: entry.prompt }), text);
  if (entry.answer.length > 320) words.append(unfold(text));
  const node = make("li", { className: "card" }, cardPicture(entry), words, cardFoot(entry));
  return node;
}

function cardPicture({ images }) {
  const box = make("div", { className: "card-picture" });
  const thumb = images[0]?.thumb ?? "";
  // Kept entries are data of this browser: only pictures drawn here are shown.
  if (thumb.startsWith("data:image/")) box.append(make("img", { src: thumb, alt: images[0].name }));
  else box.append(icon("picture"));
  if (images.length > 1) box.append(make("span", { textContent: `+${images.length - 1}` }));
  return box;
}

function unfold(text) {
  const button = make("button", { type: "button", className: "quiet", textContent: "Show all" });
  button.setAttribute("aria-expanded", "false");
  text.classList.add("folded");
  button.addEventListener("click", () => {
    const folded = text.classList.toggle("folded");
    button.setAttribute("aria-expanded", String(!folded));
    button.textContent = folded ? "Show all" : "Show less";
  });
  return button;
}

function cardFoot(entry) {
  const line = make("p", { className: "meta", textContent: figuresLine(entry) });
  const said = make("p", { className: "when" }, ...cardWhen(entry));
  const buttons = make("div", { className: "card-buttons" });
  buttons.append(
    iconButton("copy", "Copy this answer", (button) => copyFrom(button, entry.answer)),
    iconButton("trash", "Delete this answer", (button) => remove(entry, button)),
  );
  const foot = make("div", { className: "card-foot" }, line, said, buttons);
  if (entry.timings) foot.append(cardDetails(entry));
  return foot;
}

function cardWhen(entry) {
  const when = new Date(entry.time);
  const time = make("time", { dateTime: entry.time, textContent: when.toLocaleTimeString() });
  time.title = when.toLocaleString();
  const times = entry.times ? `× ${entry.times} · ` : "";
  return [times, finishNote(entry).replace(".", " · "), time];
}

function cardDetails(entry) {
  const body = make("div");
  const details = make("details", {}, make("summary", { textContent: "Details" }), body);
  details.addEventListener("toggle", () => details.open && fillDetails(body, entry), { once: true });
  return details;
}

function remove(entry, button) {
  const node = button.closest("li");
  const next = node.nextElementSibling ?? node.previousElementSibling;
  history.splice(history.indexOf(entry), 1);
  forget(`answer:${entry.id}`);
  saveRest();
  node.remove();
  showHistory();
  (next?.querySelector(".card-buttons button:last-child") ?? $("question")).focus();
}

function exportHistory() {
  const lines = history.map(({ unsaved, id, ...entry }) => JSON.stringify(entry));
  const blob = new Blob([lines.map((line) => `${line}\n`).join("")], { type: "application/jsonl" });
  const address = URL.createObjectURL(blob);
  make("a", { href: address, download: "fastvlm-history.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

async function clearHistory() {
  const dialog = $("clear-dialog");
  const n = history.length;
  $("clear-said").textContent = `${n === 1 ? "One answer is" : `${n} answers are`} deleted from this browser.`;
  dialog.returnValue = "keep";
  dialog.showModal();
  await event(dialog, "close");
  if (dialog.returnValue !== "clear") return;
  for (const { id } of history.splice(0)) forget(`answer:${id}`);
  saveRest();
  showCards();
  $("question").focus();
}

// Continuous mode: the newest frame is asked about as soon as the last answer has ended.

async function watch() {
  const mine = Object.assign(new AbortController(), { id: `${Date.now()}` });
  continuous = mine;
  if (!$("question").value.trim()) setQuestion(BUILT_IN[0].text);
  say($("answer-alert"), "");
  showRunning();
  while (!mine.signal.aborted) {
    await camera.next(mine.signal);
    const prompt = $("question").value.trim();
    if (mine.signal.aborted) break;
    if (prompt) await askAboutFrame(prompt, mine);
    else await pause(100);
  }
}

async function askAboutFrame(prompt, mine) {
  newConversation();
  try {
    await ask(prompt, [camera.frame()]);
    say($("answer-alert"), "");
  } catch (error) {
    if (error.name === "AbortError" || mine.signal.aborted) return;
    say($("answer-alert"), `${sentence(error)}${error.again ? " It goes on by itself." : ""}`);
    if (!error.again) return stopContinuous();
    if (error.lost) away();
    await Promise.race([pause(1000 * (error.wait || 1)), event(mine.signal, "abort")]);
    await untilUp(mine.signal);
  }
}

function stopContinuous() {
  $("continuous").checked = false;
  if (!continuous) return;
  continuous.abort();
  continuous = null;
  running?.abort();
  showRunning();
  showPause();
}

async function toggleContinuous() {
  if (!$("continuous").checked) return stopContinuous();
  $("chat").checked = false;
  running?.abort();
  if (!camera.on && !(await camera.start())) $("continuous").checked = false;
  else if ($("continuous").checked && !continuous) watch();
}

function toggleChat() {
  if ($("chat").checked) stopContinuous();
  show($("new-chat"), $("chat").checked && conversation.messages.length);
  keep("chat", $("chat").checked);
}

function beginChat() {
  running?.abort();
  newConversation();
  latest = null;
  showNothing("A new chat: its first question takes the picture along.");
  show($("figures"), false);
  show($("copy"), false);
  $("question").focus();
}

function stop() {
  stopContinuous();
  running?.abort();
}

function showRunning() {
  const busy = Boolean(running || continuous);
  const focused = document.activeElement;
  show($("stop"), busy);
  show($("send"), !busy);
  if (busy && focused === $("send")) $("stop").focus();
  if (!busy && focused === $("stop")) $("question").focus();
}

// Prompts

let ownPrompts = kept("prompts", []); // all of them, also those that a full storage did not take

function prompts() {
  return [...BUILT_IN, ...ownPrompts.map((text) => ({ label: text, text, own: true }))];
}

function showPrompts() {
  $("prompts").replaceChildren(...prompts().map(promptItem));
  markPrompt();
}

function promptItem({ label, text, own, edit }) {
  const button = make("button", { type: "button", className: "chip", textContent: label, title: text });
  button.dataset.text = text;
  button.addEventListener("click", () => {
    setQuestion(text);
    if (!edit) return;
    const start = text.indexOf(edit);
    $("question").focus();
    $("question").setSelectionRange(start, start + edit.length);
  });
  const item = make("li", {}, button);
  if (own) item.append(iconButton("close", `Forget the prompt ${label}`, () => forgetPrompt(text)));
  return item;
}

function markPrompt() {
  const text = $("question").value.trim();
  for (const chip of $("prompts").querySelectorAll(".chip"))
    chip.setAttribute("aria-pressed", String(chip.dataset.text === text));
  show($("keep"), text && !prompts().some((prompt) => prompt.text === text));
}

function setQuestion(text) {
  $("question").value = text;
  questionChanged();
}

function questionChanged() {
  const area = $("question");
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, 160)}px`;
  markPrompt();
}

function keepPrompt() {
  const text = $("question").value.trim();
  setPrompts([...ownPrompts, text]);
  $("question").focus();
}

function forgetPrompt(text) {
  setPrompts(ownPrompts.filter((prompt) => prompt !== text));
  $("question").focus();
}

function setPrompts(texts) {
  ownPrompts = texts;
  if (!keep("prompts", texts)) sayFull();
  showPrompts();
}

// What people do

function onKey(pressed) {
  // While a word is being composed, Enter chooses it. Safari ends composing before the key comes.
  if (pressed.isComposing || pressed.keyCode === 229) return;
  if (pressed.key === "Enter" && !pressed.shiftKey) {
    pressed.preventDefault();
    askOnce();
  }
}

function wireDrops() {
  let depth = 0;
  const over = (on) => ($("stage").dataset.over = String(on));
  const hasFiles = (dragged) => [...dragged.dataTransfer.types].includes("Files");
  addEventListener("dragenter", (dragged) => hasFiles(dragged) && over(++depth > 0));
  addEventListener("dragleave", (dragged) => hasFiles(dragged) && over(--depth > 0));
  addEventListener("dragover", (dragged) => dragged.preventDefault());
  addEventListener("drop", (dropped) => {
    depth = 0;
    over(false);
    dropped.preventDefault();
    const files = filesOf(dropped.dataTransfer);
    if (files.length) take(files);
    else say($("picture-alert"), "Only files can be dropped here: save the picture first.");
  });
}

function wire() {
  let beside = false;
  const choose = (add) => () => {
    beside = add;
    $("file").click();
  };
  $("choose").addEventListener("click", choose(false));
  $("choose-2").addEventListener("click", choose(false));
  $("add").addEventListener("click", choose(true));
  $("file").addEventListener("change", () => {
    const files = [...$("file").files];
    $("file").value = ""; // so that the same file can be chosen again
    take(files, beside && !camera.on);
  });
  for (const id of ["camera-on", "camera-on-2"])
    $(id).addEventListener("click", async () => (await camera.start()) && $("camera-off").focus());
  for (const button of document.querySelectorAll(".samples button"))
    button.addEventListener("click", () => takeSample(button));
  $("camera-off").addEventListener("click", () => {
    camera.stop();
    (pictures.length ? $("add") : $("choose")).focus();
  });
  $("cameras").addEventListener("change", () => camera.start($("cameras").value));
  $("question").addEventListener("keydown", onKey);
  $("question").addEventListener("input", questionChanged);
  $("ask").addEventListener("submit", (submitted) => {
    submitted.preventDefault();
    askOnce();
  });
  $("stop").addEventListener("click", stop);
  $("keep").addEventListener("click", keepPrompt);
  $("chat").addEventListener("change", toggleChat);
  $("continuous").addEventListener("change", toggleContinuous);
  $("new-chat").addEventListener("click", beginChat);
  $("copy").addEventListener("click", () => copyFrom($("copy"), latest.entry.answer));
  $("details").addEventListener("toggle", () => {
    if ($("details").open && latest) fillDetails($("details-body"), latest.entry);
  });
  $("size").addEventListener("change", () => keep(`size:${server.model.id}`, Number($("size").value)));
  $("export").addEventListener("click", exportHistory);
  $("clear").addEventListener("click", clearHistory);
  $("more").addEventListener("click", () => {
    cardsShown += CARDS_AT_ONCE;
    showCards();
  });
  $("key-form").addEventListener("submit", enterKey);
}

function wirePage() {
  addEventListener("paste", (pasted) => {
    const files = filesOf(pasted.clipboardData);
    // A table's cells come as text and as a picture of them: in the question they are text.
    const text = pasted.target === $("question") && pasted.clipboardData.getData("text/plain");
    if (!files.length || text) return;
    pasted.preventDefault();
    take(files);
  });
  addEventListener("keydown", (pressed) => {
    const dialog = document.querySelector("dialog[open]");
    if (pressed.key === "Escape" && !pressed.isComposing && !dialog) stop();
  });
  document.addEventListener("visibilitychange", () => {
    showAgain();
    if (!document.hidden) check();
  });
  addEventListener("pagehide", () => {
    leaving = true;
    camera.release();
    running?.abort();
  });
  addEventListener("pageshow", (shown) => {
    leaving = false;
    if (!shown.persisted) return; // else the browser brings the page back as it was left
    if (camera.on) camera.stop();
    showCards();
  });
  addEventListener("beforeunload", (leaving) => {
    if (history.some((entry) => entry.unsaved)) leaving.preventDefault();
  });
}

wire();
wirePage();
wireDrops();
$("chat").checked = kept("chat", false);
newConversation();
showPictures();
showPrompts();
loadHistory();
watchServer();
