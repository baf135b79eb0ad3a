// BullMQ on Node: `use_bullmq.mjs work CONCURRENCY`, `submit JOBS`, `timed JOBS RATE`; common.py says what is counted where.
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';

const require = createRequire(path.join(process.env.BENCH_HOME, 'index.js'));
const { Queue, Worker } = require('bullmq');
const IORedis = require('ioredis').default ?? require('ioredis');

const SLOT_BYTES = 64;
const LAST_SLOT = 256; // Python processes take theirs from the other end
const AT_LATENCIES = SLOT_BYTES * (LAST_SLOT + 1);
const BULK = 1000;
const [verb, first, second] = process.argv.slice(2);
const connect = () => new IORedis(process.env.BENCH_REDIS_URL, { maxRetriesPerRequest: null });
const nowNs = () => process.hrtime.bigint();
const payload = n => ({ to: `user${1000000 + n}@mail.example.com`, n: 1000000 + n });

function work(concurrency) {
  const file = fs.openSync(process.env.BENCH_LEDGER, 'r+');
  const slot = SLOT_BYTES * (LAST_SLOT - Number(process.env.BENCH_NUMBER));
  const words = Buffer.alloc(16);
  const one = Buffer.alloc(8);
  let count = 0;
  let written = 0;
  const write = () => {
    if (count === written) return;
    written = count;
    words.writeBigUInt64LE(BigInt(count), 0);
    fs.writeSync(file, words, 0, 16, slot);
  };
  setInterval(write, 5);
  const run = async job => {
    const begun = nowNs();
    if (count++ === 0) {
      words.writeBigUInt64LE(begun, 8);
      write();
    }
    if (job.name === 'timed') {
      one.writeBigUInt64LE(begun - BigInt(job.data.sent));
      fs.writeSync(file, one, 0, 8, AT_LATENCIES + 8 * job.data.number);
    }
  };
  new Worker('bench', run, { connection: connect(), concurrency, removeOnComplete: { count: 0 } });
}

async function submit(queue, jobs) {
  for (let at = 0; at < jobs; at += BULK) {
    const length = Math.min(BULK, jobs - at);
    await queue.addBulk(Array.from({ length }, (_, k) => ({ name: 'noop', data: payload(at + k) })));
  }
}

async function timed(queue, jobs, rate) {
  const begun = performance.now();
  for (let number = 0; number < jobs; number++) {
    await queue.add('timed', { sent: String(nowNs()), number });
    const pause = begun + (number + 1) * 1000 / rate - performance.now();
    if (pause > 0) await new Promise(resolve => setTimeout(resolve, pause));
  }
}

if (verb === 'work') {
  work(Number(first));
} else {
  const queue = new Queue('bench', { connection: connect() });
  await queue.waitUntilReady();
  const jobs = Number(first);
  const cpu = process.cpuUsage();
  const begun = nowNs();
  await (verb === 'submit' ? submit(queue, jobs) : timed(queue, jobs, Number(second)));
  const ended = nowNs();
  const spent = process.cpuUsage(cpu);
  console.log(JSON.stringify({
    jobs, begun_ns: Number(begun), ended_ns: Number(ended), cpu_ns: (spent.user + spent.system) * 1000,
  }));
  process.exit(0);
}
