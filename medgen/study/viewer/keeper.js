// Where answers are kept in the browser: localStorage, which is there at once, and IndexedDB, which says when it is on the disk.
//
// Chromium writes localStorage seconds later: a browser that is killed loses them. A strict transaction of IndexedDB has reached the disk
// when it completes (https://w3c.github.io/IndexedDB/#transaction-durability-hint), and works for pages that were opened from a disk.

const PATIENCE = 1500; // ms: a browser whose IndexedDB does not answer keeps nobody from reading

function within(promise) {
  return Promise.race([promise, new Promise((_, reject) => setTimeout(() => reject(new Error("no answer")), PATIENCE))]);
}

function answered(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** Texts by name. Of two copies the one that was saved more often stands: a kill may have left one of them behind. */
class Keeper {
  constructor(local) {
    this.local = local;
    this.copies = new Map();
    this.written = Promise.resolve();
  }

  /** Opens the second copy; without it (policy, an old browser) the first one goes on alone. */
  async open() {
    const opening = indexedDB.open("medgen-study", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("answers");
    const database = await within(answered(opening));
    const store = database.transaction("answers").objectStore("answers");
    const [names, texts] = await within(Promise.all([answered(store.getAllKeys()), answered(store.getAll())]));
    names.forEach((name, n) => this.copies.set(name, texts[n]));
    this.database = database;
  }

  getItem(name) {
    const copies = [this.local.getItem(name), this.copies.get(name)].filter(Boolean);
    const turn = (text) => JSON.parse(text).turn ?? 0;
    return copies.length < 2 || turn(copies[0]) >= turn(copies[1]) ? (copies[0] ?? null) : copies[1];
  }

  setItem(name, text) {
    this.local.setItem(name, text);
    if (!this.database) return;
    this.copies.set(name, text);
    const change = this.database.transaction("answers", "readwrite", { durability: "strict" });
    change.objectStore("answers").put(text, name);
    this.written = new Promise((resolve) => (change.oncomplete = change.onabort = resolve));
  }

  /** Resolves when what was set last is on the disk. */
  settled() {
    return within(this.written).catch(() => {});
  }
}

/** What keeps answers, or null where the browser keeps nothing (private window, policy, full). */
async function openStorage() {
  let keeper;
  try {
    window.localStorage.setItem("medgen-study-probe", "1".repeat(1000));
    window.localStorage.removeItem("medgen-study-probe");
    keeper = new Keeper(window.localStorage);
  } catch {
    return null;
  }
  await keeper.open().catch(() => {});
  return keeper;
}
