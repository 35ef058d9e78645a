// What gRPC connects to.

import { lookup } from "node:dns/promises";

import { ClientError } from "./errors.js";

const HOST_PORT = /^(?:\[(?<ip>[^\]]+)\]|(?<name>[^\[\]:]+)):(?<port>\d+)$/;

/** `addresses`, of which there is one, or each is "host:port"; else throws TypeError. */
export function checked(addresses: readonly string[]): readonly string[] {
  if (addresses.length === 0) {
    throw new TypeError("`address` is empty: give one or more of the form 'host:port'");
  }
  const wrong = addresses.length > 1 && addresses.find((address) => !HOST_PORT.test(address));
  if (wrong) throw new TypeError(`\`address\` has '${wrong}': give each as 'host:port'`);
  return addresses;
}

/**
 * The target of gRPC for all of `addresses`, by their IPs if they are several, and the host that
 * their certificates are for then.
 *
 * @throws ClientError if one has no IP, or they have none of one family.
 */
export async function targetOf(
  addresses: readonly string[],
): Promise<{ target: string; host?: string }> {
  const [first, ...others] = addresses as readonly [string, ...string[]];
  if (others.length === 0) return { target: first };
  const found = await Promise.all(addresses.map(ipsOf));
  const ips = [...new Set(found.flatMap(({ ips }) => ips))];
  const families = new Set(found.map(({ family }) => family));
  if (families.size > 1) {
    throw new ClientError(
      `\`address\` has both IPv4 and IPv6, and gRPC takes one: ${ips}`, "INVALID_ARGUMENT",
    );
  }
  return { target: `ipv${[...families]}:${ips}`, host: hostOf(first).host };
}

/** Each "IP:port" that an address stands for: those of IPv4, or where it has none, of IPv6. */
async function ipsOf(address: string): Promise<{ family: 4 | 6; ips: string[] }> {
  const { host, port } = hostOf(address);
  const found = await lookup(host, { all: true }).catch((error: Error) => {
    throw new ClientError(`'${address}' has no IP: ${error.message}`, "UNAVAILABLE");
  });
  const in4 = found.filter(({ family }) => family === 4);
  if (in4.length) return { family: 4, ips: in4.map((one) => `${one.address}:${port}`) };
  return { family: 6, ips: found.map((one) => `[${one.address}]:${port}`) };
}

function hostOf(address: string): { host: string; port: string } {
  const { ip, name, port } = HOST_PORT.exec(address)?.groups ?? {};
  return { host: (ip ?? name) as string, port: port as string };
}
